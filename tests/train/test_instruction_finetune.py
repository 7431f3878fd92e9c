"""Runs `lm instruction_finetune` on the tiny pretrained model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from fairseq2.models import ModelNotKnownError
from fairseq2.recipe.error import RecipeError
from fairseq2.utils.validation import ValidationError

from moxe_plugin.train.launch import load_preset, run_recipe
from tests.train.tiny_data import TinyData, read_metrics


def _finetune(
    data: TinyData,
    output_dir: Path,
    overrides: Mapping[str, object],
    preset: str = "instruct/quickstart",
) -> None:
    config = load_preset(
        preset,
        {
            "regime.num_steps": 20,
            "regime.publish_metrics_every_n_steps": 5,
            "common.torch.num_threads": 1,
            "common.metric_recorders.tensorboard.enabled": False,
            **data.finetune_overrides,
            **overrides,
        },
        recipe="lm/instruction_finetune",
    )

    run_recipe("lm/instruction_finetune", config, output_dir, quiet=True)


def _load_weights(output_dir: Path, step: int) -> dict[str, torch.Tensor]:
    file = output_dir / f"checkpoints/step_{step}/model/pp_00/tp_00/sdp_00.pt"

    weights: dict[str, torch.Tensor] = torch.load(file)

    return weights


@pytest.mark.parametrize(
    ("path", "step"), [("", 8), ("checkpoints/step_4", 4)], ids=["last_step", "step_4"]
)
def test_finetuning_starts_from_the_checkpoint(
    tiny_data: TinyData, pretrained_dir: Path, tmp_path: Path, path: str, step: int
) -> None:
    overrides = {
        "pretrained.source": str(pretrained_dir / path),
        "optimizer.config.lr": 0.0,
        "optimizer.config.weight_decay": 0.0,
        "regime.num_steps": 1,
        "lr_scheduler.config.num_warmup_steps": 0,
    }

    _finetune(tiny_data, tmp_path, overrides)

    actual = _load_weights(tmp_path, 1)
    expected = _load_weights(pretrained_dir, step)

    assert set(actual) == set(expected)

    for name, weight in actual.items():
        assert torch.equal(weight, expected[name]), name


def test_global_workspace_is_open_in_finetuning_and_closed_in_validation(
    tiny_data: TinyData, pretrained_dir: Path, tmp_path: Path
) -> None:
    overrides = {
        "pretrained.source": str(pretrained_dir),
        "regime.num_steps": 5,
        "regime.validate_every_n_steps": 5,
    }

    _finetune(tiny_data, tmp_path, overrides, preset="instruct/global_workspace")

    (train,), (valid,) = (read_metrics(tmp_path, c) for c in ("train", "valid"))

    assert 2.0 < train["layer_0/experts_per_token"] <= 4.0
    assert valid["layer_0/experts_per_token"] == 2.0


def test_preset_of_gsm8k_learns_from_questions_and_answers(
    tiny_data: TinyData, pretrained_dir: Path, tmp_path: Path
) -> None:
    data_dir = tmp_path / "gsm8k"
    data_dir.mkdir()

    for split in ("train", "valid"):
        lines = [
            json.dumps({"question": f"{n}?", "answer": f"#### {2 * n}"})
            for n in range(8)
        ]
        data_dir.joinpath(f"{split}.jsonl").write_text("\n".join(lines))

    overrides: dict[str, object] = {
        "pretrained.source": str(pretrained_dir),
        "dataset.path": str(data_dir),
        "dataset.seq_len": 64,
        "regime.validate_at_start": True,
        "regime.num_steps": 10,
        "regime.validate_every_n_steps": 10,
        "regime.checkpoint_every_n_steps": 10,
    }

    _finetune(tiny_data, tmp_path / "out", overrides, preset="instruct/gsm8k")

    before, after = read_metrics(tmp_path / "out", "valid")

    assert after["NLL Loss"] < before["NLL Loss"] - 0.1


def test_finetuning_lowers_the_loss_on_held_out_instructions(
    tiny_data: TinyData, pretrained_dir: Path, tmp_path: Path
) -> None:
    overrides: dict[str, object] = {
        "pretrained.source": str(pretrained_dir),
        "regime.validate_at_start": True,
        "regime.validate_every_n_steps": 20,
        "regime.checkpoint_every_n_steps": 20,
    }

    _finetune(tiny_data, tmp_path, overrides)

    valid = read_metrics(tmp_path, "valid")

    assert [m["Step"] for m in valid] == [0, 20]
    assert valid[1]["NLL Loss"] < valid[0]["NLL Loss"] - 0.5


def test_missing_source_is_refused(tiny_data: TinyData, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"`pretrained\.source` must be"):
        _finetune(tiny_data, tmp_path, {})


def test_unknown_source_is_refused(tiny_data: TinyData, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'nothing' is no directory"):
        _finetune(tiny_data, tmp_path, {"pretrained.source": "./nothing"})

    with pytest.raises(ModelNotKnownError, match="nothing"):
        _finetune(tiny_data, tmp_path, {"pretrained.source": "nothing"})


def test_unknown_step_is_refused(
    tiny_data: TinyData, pretrained_dir: Path, tmp_path: Path
) -> None:
    overrides = {"pretrained.source": str(pretrained_dir), "pretrained.step": 5}

    with pytest.raises(RecipeError, match=r"no checkpoint of step 5. Its steps: 4, 8"):
        _finetune(tiny_data, tmp_path, overrides)
