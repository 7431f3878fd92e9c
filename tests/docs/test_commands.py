"""Every command in README.md and docs/ works as it is printed there.

A page's blocks run in order in one shell, in a directory that holds the output of the
training of ``docs/howto/train.md`` (`outputs/tiny`), of which the other pages speak.
Blocks that cannot run here are marked, as in ````` ```bash skip=gpu ````` (see
:data:`tests.docs.pages.MARKS`): their options and names are checked instead.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from tests.docs.pages import ROOT, Block, list_pages, read_blocks
from tests.docs.shell import DocsShell, FailedPageError

_TRAIN_PAGE: Final = "docs/howto/train.md"

_PAGES: Final = [page for page in list_pages() if read_blocks(page)]

_FEW_STEPS: Final = (
    "--config regime.num_steps=2 lr_scheduler.config.num_warmup_steps=1 "
    "dataset.batch_size=2 dataset.max_num_valid_batches=1"
)

_SHORTENED: Final[Mapping[str, Mapping[str, str]]] = {
    "README.md": {
        "OUT --preset quickstart/moxe --config regime.num_steps=240": (
            f"OUT --preset quickstart/moxe {_FEW_STEPS}"
        ),
        "--preset instruct/quickstart --from OUT": (
            f"--preset instruct/quickstart --from OUT {_FEW_STEPS}"
        ),
        "OUT5 --preset quickstart/moxe": f"OUT5 --preset quickstart/moxe {_FEW_STEPS}",
        "last_word": "last_word --limit 2",
        "--size quickstart": "--size tiny",
    },
}
"""What is replaced in the commands of a page, so that they take seconds."""

_TEXT: Final = json.dumps({"text": "The list is sorted. " * 20}) + "\n"

_FILES: Final[Mapping[str, Mapping[str, str]]] = {
    "README.md": {
        "text.txt": "The list is sorted.",
        "train.jsonl": _TEXT,
        "test.jsonl": _TEXT,
    },
}
"""The reader's files that the commands of a page name."""

_RECORDS: Final[Mapping[str, Sequence[str]]] = {
    "README.md": ["moxe_embedded_cpu1_20261123_s2"],
}
"""Records of runs in ``results/`` that they read."""


@pytest.fixture(scope="module")
def shell(
    tmp_path_factory: pytest.TempPathFactory,
    embedded_data: object,  # noqa: ARG001  # the commands find it in the cache
) -> Iterator[DocsShell]:
    shell = DocsShell(tmp_path_factory.mktemp("shell"))

    with shell.open():
        yield shell


@pytest.fixture(scope="module")
def trained(shell: DocsShell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")

    _run_page(shell, _TRAIN_PAGE, directory)

    return directory


@pytest.mark.parametrize("page", _PAGES)
def test_commands_of_a_page_work(
    page: str, shell: DocsShell, trained: Path, tmp_path: Path
) -> None:
    if page == _TRAIN_PAGE:
        assert trained.joinpath("outputs", "tiny", "checkpoints").is_dir()
        return

    shutil.copytree(trained / "outputs" / "tiny", tmp_path / "outputs" / "tiny")

    _run_page(shell, page, tmp_path)


def test_a_failing_command_fails_with_its_output(
    shell: DocsShell, tmp_path: Path
) -> None:
    block = _block("moxe data embedded | cat\nmoxe data info nowhere | cat\nls\n")

    with pytest.raises(FailedPageError, match=r"(?s)no_page:7.*tokenizer .*nowhere"):
        shell.run([block], tmp_path)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("fairseq2 lm pretrain OUT --preset quickstart/mox", "must be a preset of"),
        ("fairseq2 lm pretrain OUT --pre quickstart/moxe", "unrecognized arguments"),
        ("srun fairseq2 lm pretrain OUT --config regime.num_stesp=1", "num_stesp"),
        ("moxe bench quickstrat", "is not a known suite"),
        ("moxe export OUT model --stepp 1", "unrecognized arguments"),
        ("lm_eval --model moxe --tasks moxe_embedded_roling", "are not tasks"),
        ("torchrun --nproc-per-node 2 -m moxe_plugin lm pretrian OUT", "pretrian"),
        ("tox run -e quickstrat", "is not an environment"),
    ],
)
def test_a_marked_block_is_checked(
    code: str, reason: str, shell: DocsShell, tmp_path: Path
) -> None:
    with pytest.raises(FailedPageError, match=reason):
        shell.check(_block(code + "\n"), tmp_path)


def _run_page(shell: DocsShell, page: str, directory: Path) -> None:
    for name, text in _FILES.get(page, {}).items():
        directory.joinpath(name).write_text(text, encoding="utf-8")

    for name in _RECORDS.get(page, []):
        shutil.copytree(ROOT / "results" / name, directory / "results" / name)

    blocks = _shorten(page, read_blocks(page))

    for block in blocks:
        if block.mark is not None:
            assert shell.check(block, directory) or block.mark == "install", block.place

    shell.run([block for block in blocks if block.mark is None], directory)


def _shorten(page: str, blocks: list[Block]) -> list[Block]:
    for old, new in _SHORTENED.get(page, {}).items():
        assert any(old in block.code for block in blocks), f"{page}: no '{old}' to cut"

        blocks = [replace(b, code=b.code.replace(old, new)) for b in blocks]

    return blocks


def _block(code: str) -> Block:
    return Block(page="no_page", line=7, code=code, mark=None)
