"""The shell of the tests of commands."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.docs.shell import DocsShell


@pytest.fixture(scope="session")
def shell(
    tmp_path_factory: pytest.TempPathFactory,
    embedded_data: object,  # noqa: ARG001  # the commands find it in the cache
) -> Iterator[DocsShell]:
    """Start a shell whose commands have imported everything.

    :param tmp_path_factory: Makes the directory for its programs.
    :param embedded_data: The data of the quickstart.

    :yields: The shell.
    """
    shell = DocsShell(tmp_path_factory.mktemp("shell"))

    with shell.open():
        yield shell
