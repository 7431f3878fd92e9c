"""Runs the commands of a page, shortened where they would take minutes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from tests.docs.pages import ROOT, Block, read_blocks
from tests.docs.shell import DocsShell

TRAINED_DIR: Final = "outputs/tiny"
"""What ``docs/howto/train.md`` trains, and other pages read."""

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


def run_page(shell: DocsShell, page: str, directory: Path) -> None:
    """Run the blocks of a page, and check those that cannot run here.

    :param shell: Runs them.
    :param page: The page.
    :param directory: Where; gets the files of the reader that the page names.
    """
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
