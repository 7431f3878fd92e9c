"""Tests of moxe_plugin/eval/__main__.py."""

from __future__ import annotations

import pytest

from moxe_plugin.eval.__main__ import main
from moxe_plugin.resources import resource_dir


def test_the_task_path_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--print-task-path"]) == 0
    assert capsys.readouterr().out.strip() == str(resource_dir("eval_tasks"))


def test_the_harness_gets_our_tasks_and_its_own_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lm_eval._cli import HarnessCLI

    seen = []
    monkeypatch.setattr(HarnessCLI, "execute", lambda _, args: seen.append(args))
    argv = ["--model", "moxe", "--tasks", "moxe_lambada", "--include_path", "/mine"]

    assert main(argv) == 0

    (args,) = seen
    assert args.command == "run"
    assert args.model == "moxe"
    assert args.include_path == [str(resource_dir("eval_tasks")), "/mine"]


def test_a_wrong_option_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval._cli import HarnessCLI

    def fail(*_: object) -> None:
        raise ValueError("Tasks not found: nope")

    monkeypatch.setattr(HarnessCLI, "execute", fail)

    assert main(["--model", "moxe", "--tasks", "nope"]) == 2

    assert capsys.readouterr().err == (
        "moxe_plugin.eval: error: Tasks not found: nope\n"
    )
