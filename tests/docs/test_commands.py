"""Every command in README.md and docs/ works as it is printed there.

A page's blocks run in order in one shell, in a directory of their own. Blocks that
cannot run here are marked, as in ````` ```bash skip=gpu ````` (see
:data:`tests.docs.pages.MARKS`): their options and names are checked instead. Pages that
speak of a trained model are in ``test_commands_on_a_run.py``, so that another process
of pytest can run them meanwhile.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from tests.docs.pages import Block, list_pages, read_blocks
from tests.docs.running import TRAINED_DIR, run_page
from tests.docs.shell import DocsShell, FailedPageError

_PAGES: Final = [
    page
    for page in list_pages()
    if (blocks := read_blocks(page)) and not any(TRAINED_DIR in b.code for b in blocks)
]


@pytest.mark.parametrize("page", _PAGES)
def test_commands_of_a_page_work(page: str, shell: DocsShell, tmp_path: Path) -> None:
    run_page(shell, page, tmp_path)


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


def _block(code: str) -> Block:
    return Block(page="no_page", line=7, code=code, mark=None)
