"""Checks how checkpoints of a training run are found."""

from __future__ import annotations

from pathlib import Path

import pytest
from fairseq2.recipe.error import RecipeError

from moxe_plugin.train.output_dir import find_trained_model, list_steps


def _make_run(run_dir: Path, steps: tuple[str, ...] = ("4", "10")) -> Path:
    for step in steps:
        run_dir.joinpath("checkpoints", f"step_{step}").mkdir(parents=True)

    run_dir.joinpath("checkpoints", "model.yaml").touch()
    run_dir.joinpath("config.yaml").write_text("tokenizer: {name: foo}")

    return run_dir


def test_last_checkpoint_is_found(tmp_path: Path) -> None:
    run_dir = _make_run(tmp_path / "run")

    model = find_trained_model(run_dir, None)

    assert model == (run_dir / "checkpoints", "last_checkpoint", {"name": "foo"})


def test_checkpoint_of_a_step_is_found_in_the_only_sweep_dir(tmp_path: Path) -> None:
    run_dir = _make_run(tmp_path / "ws_1.abc")

    model = find_trained_model(tmp_path, 4)

    assert model[:2] == (run_dir / "checkpoints", "checkpoint_step_4")


def test_unfinished_checkpoints_do_not_count(tmp_path: Path) -> None:
    _make_run(tmp_path, ("4", "8.tmp", "x"))

    assert list_steps(tmp_path / "checkpoints") == [4]


def test_unknown_step_is_refused(tmp_path: Path) -> None:
    _make_run(tmp_path)

    with pytest.raises(RecipeError, match=r"no checkpoint of step 5. Its steps: 4, 10"):
        find_trained_model(tmp_path, 5)


def test_run_without_checkpoint_is_refused(tmp_path: Path) -> None:
    tmp_path.joinpath("checkpoints").mkdir()
    _make_run(tmp_path, ())

    with pytest.raises(RecipeError, match="has no checkpoint"):
        find_trained_model(tmp_path, None)


def test_two_sweep_dirs_are_refused(tmp_path: Path) -> None:
    _make_run(tmp_path / "ws_1.abc")
    _make_run(tmp_path / "ws_1.def")

    with pytest.raises(RecipeError, match=r"more than one .* ws_1\.abc, ws_1\.def"):
        find_trained_model(tmp_path, None)


def test_other_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not the output directory of a training"):
        find_trained_model(tmp_path, None)

    with pytest.raises(RecipeError, match="neither a directory nor a known asset"):
        find_trained_model(tmp_path / "nothing", None)
