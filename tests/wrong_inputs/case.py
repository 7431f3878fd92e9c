"""One wrong input: what is typed, how the command ends, and what it says."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Final, NamedTuple

import pytest

from moxe_plugin.cli import main as fairseq2_main
from moxe_plugin.cli import moxe_main
from moxe_plugin.eval.__main__ import main as eval_main

_COMMANDS: Final[dict[str, Callable[[list[str]], int]]] = {
    "fairseq2": fairseq2_main,
    "moxe": moxe_main,
    # The same as `lm_eval`, but with our tasks, and with our way to tell errors.
    "lm_eval": eval_main,
}

_TEXTS: Final = (".json", ".jsonl", ".md", ".txt", ".yaml")


class Case(NamedTuple):
    """A wrong input."""

    name: str
    """What is wrong."""

    command: str
    """What is typed; ``$name`` stands for a path of :class:`Places`."""

    exit_code: int
    """2 for a mistake of the user, 1 for data or an environment that is damaged."""

    fragments: tuple[str, ...]
    """What the message must have; ``$name`` as in the command."""


class Outcome(NamedTuple):
    """How a command ended."""

    exit_code: int
    output: str
    """Standard output and standard error."""


def parametrize(cases: list[Case]) -> pytest.MarkDecorator:
    """Run a test for every case.

    :param cases: The cases.

    :returns: The decorator of a test with the argument ``case``.
    """
    return pytest.mark.parametrize("case", cases, ids=[c.name for c in cases])


def run_case(
    case: Case, places: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> Outcome:
    """Run the command of a case in this process.

    :param case: The case.
    :param places: What stands for the ``$name`` in it.
    :param capfd: Captures what the command writes.

    :returns: How it ended.
    """
    text = Template(case.command).substitute({k: str(v) for k, v in places.items()})
    name, *argv = shlex.split(text)

    exit_code: object = None

    try:
        exit_code = _COMMANDS[name](argv)
    except SystemExit as ex:
        exit_code = ex.code

    assert isinstance(exit_code, int)

    out, err = capfd.readouterr()

    return Outcome(exit_code, out + err)


def list_files(directory: Path) -> dict[str, object]:
    """List what must stay as it is while a wrong command runs.

    :param directory: A directory.

    :returns: The content of every text in it, and size and time of change of every
        other file, by path. Logs are left out: they grow.
    """
    return {
        str(path.relative_to(directory)): _describe(path)
        for path in directory.rglob("*")
        if "logs" not in path.parts
    }


def _describe(path: Path) -> object:
    if path.is_dir():
        return "a directory"

    if path.suffix in _TEXTS:
        return path.read_bytes()

    info = path.stat()

    return info.st_size, info.st_mtime_ns
