"""Commands of pages that read the model of ``docs/howto/train.md`` work, too.

Each page's directory holds what the commands of that page have trained, `outputs/tiny`.
See ``test_commands.py``.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

import pytest

from tests.docs.pages import list_pages, read_blocks
from tests.docs.running import TRAINED_DIR, run_page
from tests.docs.shell import DocsShell

_TRAIN_PAGE: Final = "docs/howto/train.md"

_PAGES: Final = [
    page
    for page in list_pages()
    if any(TRAINED_DIR in block.code for block in read_blocks(page))
]


@pytest.fixture(scope="module")
def trained(shell: DocsShell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")

    run_page(shell, _TRAIN_PAGE, directory)

    return directory / TRAINED_DIR


@pytest.mark.parametrize("page", _PAGES)
def test_commands_of_a_page_work(
    page: str, shell: DocsShell, trained: Path, tmp_path: Path
) -> None:
    if page == _TRAIN_PAGE:
        assert trained.joinpath("checkpoints").is_dir()
        return

    shutil.copytree(trained, tmp_path / TRAINED_DIR)

    run_page(shell, page, tmp_path)
