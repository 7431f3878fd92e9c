"""Checks how every command answers wrong inputs: in a line, and without any loss."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from string import Template
from traceback import format_exception_only

import pytest
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import TaskManager

from moxe_plugin.resources import resource_dir
from tests.wrong_inputs.case import Case, list_files, parametrize, run_case
from tests.wrong_inputs.eval_cases import EVAL_CASES
from tests.wrong_inputs.lm_cases import (
    DATA_CASES,
    FINETUNE_CASES,
    GENERATE_CASES,
    MODEL_CASES,
    RECIPE_CASES,
)
from tests.wrong_inputs.moxe_cases import MOXE_CASES
from tests.wrong_inputs.resume_cases import RESUME_CASES


@pytest.fixture
def _only_our_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    # The harness takes seconds to index its own thousands of tasks, at every command.
    init = TaskManager.__init__

    monkeypatch.setattr(init, "__defaults__", (None, None, False, None))

    # Its logger keeps the standard error of the first command.
    monkeypatch.setattr("lm_eval.utils._LOGGING_CONFIGURED", False)
    monkeypatch.setattr(logging.getLogger("lm_eval"), "handlers", [])


@parametrize([*MODEL_CASES, *RECIPE_CASES, *DATA_CASES])
def test_wrong_pretraining_is_refused(
    case: Case,
    places: Mapping[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    _check(case, places, tmp_path, capfd)


@parametrize([*FINETUNE_CASES, *GENERATE_CASES])
def test_wrong_use_of_a_trained_model_is_refused(
    case: Case,
    places: Mapping[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    _check(case, places, tmp_path, capfd)


@parametrize(RESUME_CASES)
def test_wrong_command_leaves_a_run_as_it_is(
    case: Case,
    places: Mapping[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    _check(case, places, tmp_path, capfd)


@pytest.mark.usefixtures("_only_our_tasks")
@parametrize(EVAL_CASES)
def test_wrong_evaluation_is_refused(
    case: Case,
    places: Mapping[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    _check(case, places, tmp_path, capfd)


@parametrize(MOXE_CASES)
def test_wrong_command_of_moxe_is_refused(
    case: Case,
    places: Mapping[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    _check(case, places, tmp_path, capfd)


@pytest.mark.usefixtures("_only_our_tasks")
def test_last_line_of_plain_lm_eval_is_the_message(
    places: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The harness' own command lets an error of a model end the process: Python prints
    # a stack trace, and the message below it. `python -m moxe_plugin.eval` prints the
    # message alone.
    command = f"--model moxe --model_args checkpoint={places['run']},max_length=0"

    monkeypatch.setattr(
        "sys.argv",
        [
            *("lm_eval", *command.split(), "--tasks", "moxe_embedded_rolling"),
            *("--include_path", str(resource_dir("eval_tasks"))),
        ],
    )

    with pytest.raises(ValueError, match="`max_length` must be") as exc_info:
        cli_evaluate()

    (line,) = format_exception_only(exc_info.value)

    assert line == "ValueError: `max_length` must be positive, but is 0 instead.\n"


def _check(
    case: Case,
    places: Mapping[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    places = {**places, "out": tmp_path / "out"}

    before = list_files(places["root"])

    outcome = run_case(case, places, capfd)

    assert outcome.exit_code == case.exit_code, outcome.output
    assert "Traceback" not in outcome.output

    for fragment in case.fragments:
        text = Template(fragment).substitute({k: str(v) for k, v in places.items()})
        assert text in outcome.output

    assert list_files(places["root"]) == before
