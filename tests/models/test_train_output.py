"""Tests of moxe_plugin/models/train_output.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from moxe_plugin.models.train_output import list_steps, open_train_output


def make_run(run_dir: Path, *names: str) -> None:
    """Make the directories of checkpoints, empty."""
    for name in names:
        (run_dir / "checkpoints" / name / "model").mkdir(parents=True)

    run_dir.joinpath("checkpoints").mkdir(parents=True, exist_ok=True)
    run_dir.joinpath("checkpoints/model.yaml").write_text("model_config: {eps: 1e-05}")
    run_dir.joinpath("config.yaml").write_text("optimizer: {lr: 2e-4}")


def test_a_run_is_found_from_all_around_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "ws_1.abc"
    make_run(run_dir, "step_5", "step_20")

    for path in (tmp_path, run_dir, run_dir / "checkpoints"):
        output = open_train_output(path)
        assert (output.dir, output.step) == (run_dir, 20)
        assert output.model_dir == run_dir / "checkpoints/step_20/model"

        assert open_train_output(path, 5).step == 5

    assert open_train_output(run_dir / "checkpoints/step_5").step == 5
    assert open_train_output(run_dir / "checkpoints/step_5", 5).step == 5


def test_numbers_are_read_as_fairseq2_writes_them(tmp_path: Path) -> None:
    make_run(tmp_path, "step_5")

    output = open_train_output(tmp_path)

    # In YAML 1.1 both were texts.
    assert output.model_card == {"model_config": {"eps": 1e-05}}
    assert output.recipe_config == {"optimizer": {"lr": 2e-4}}


def test_unfinished_checkpoints_do_not_count(tmp_path: Path) -> None:
    make_run(tmp_path, "step_4", "step_8.tmp", "step_x")

    assert list_steps(tmp_path) == [4]
    assert list_steps(tmp_path / "missing") == []

    with pytest.raises(ValueError, match="is not the output directory of a training"):
        open_train_output(tmp_path / "checkpoints/step_8.tmp")


def test_a_wrong_step_is_reported(tmp_path: Path) -> None:
    make_run(tmp_path, "step_5", "step_20")

    with pytest.raises(ValueError, match=r"no checkpoint of step 7. Its steps: 5, 20"):
        open_train_output(tmp_path, 7)

    with pytest.raises(ValueError, match=r"`step` must be left out or be that of"):
        open_train_output(tmp_path / "checkpoints/step_5", 20)


def test_a_wrong_directory_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it has no checkpoints/model.yaml"):
        open_train_output(tmp_path)

    make_run(tmp_path / "ws_1.a")
    with pytest.raises(ValueError, match=r"has no checkpoint\. The training run must"):
        open_train_output(tmp_path)

    make_run(tmp_path / "ws_1.b", "step_5")
    with pytest.raises(ValueError, match=r"more than one .* ws_1\.a, ws_1\.b"):
        open_train_output(tmp_path)


def test_an_unreadable_file_is_reported(tmp_path: Path) -> None:
    make_run(tmp_path, "step_5")

    tmp_path.joinpath("config.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"config.yaml' is not valid YAML"):
        open_train_output(tmp_path)

    tmp_path.joinpath("config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"config.yaml' must hold a YAML mapping"):
        open_train_output(tmp_path)
