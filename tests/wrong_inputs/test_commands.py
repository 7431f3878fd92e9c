"""Checks how every command answers wrong inputs: in a line, and without any loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template

import pytest

from tests.wrong_inputs.case import Case, list_files, parametrize, run_case
from tests.wrong_inputs.lm_cases import (
    DATA_CASES,
    FINETUNE_CASES,
    GENERATE_CASES,
    MODEL_CASES,
    RECIPE_CASES,
)
from tests.wrong_inputs.moxe_cases import MOXE_CASES
from tests.wrong_inputs.resume_cases import RESUME_CASES


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


@parametrize(MOXE_CASES)
def test_wrong_command_of_moxe_is_refused(
    case: Case,
    places: Mapping[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    _check(case, places, tmp_path, capfd)


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
