"""Runs `lm pretrain`: what it writes, how it resumes, what it refuses."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from fairseq2.recipe.error import RecipeError
from fairseq2.utils.validation import ValidationError

from moxe_plugin.train.units import CausalLMTrainUnit
from tests.train.tiny_data import TWO_STEPS, TinyData, pretrain, read_metrics

_VARYING = ("Time", "per Second")
"""Parts of the names of metrics that two equal runs do not share."""


def _without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in metrics.items() if not any(p in k for p in _VARYING)}


def test_run_records_every_term(pretrained_dir: Path) -> None:
    train, valid = (read_metrics(pretrained_dir, c) for c in ("train", "valid"))

    assert [m["Step"] for m in train] == list(range(1, 9))
    assert [m["Step"] for m in valid] == [4, 8]

    assert "Loss" in train[0]
    assert "Bits per Byte" in valid[0]

    for metrics in (train[0], valid[0]):
        assert {"NLL Loss", "Perplexity", "Difficulty Loss", "Router Z Loss"} <= set(
            metrics
        )
        assert 0.0 <= metrics["layer_1/mlstm_share"] <= 1.0

    assert valid[1]["NLL Loss"] < valid[0]["NLL Loss"]


def test_run_uses_the_output_directory_as_it_is(pretrained_dir: Path) -> None:
    steps = [d.name for d in pretrained_dir.glob("checkpoints/step_*")]

    assert sorted(steps) == ["step_4", "step_8"]
    assert pretrained_dir.joinpath("config.yaml").is_file()


def test_log_has_no_environment_variables(pretrained_dir: Path) -> None:
    text = pretrained_dir.joinpath("logs", "rank_0.log").read_text()

    assert "Environment Variables" not in text


@pytest.mark.parametrize(
    ("options", "environment", "lines"),
    [
        ({}, {}, ["Freed memory stays in the process, for the next step."]),
        (
            {},
            {"MALLOC_MMAP_MAX_": "9"},
            [
                "`keep_freed_memory` has no effect: the environment sets "
                "`MALLOC_MMAP_MAX_`."
            ],
        ),
        ({"keep_freed_memory": False}, {}, []),
    ],
    ids=["kept", "left to the environment", "off"],
)
def test_log_tells_whether_freed_memory_is_kept(
    tiny_data: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
    environment: dict[str, str],
    lines: list[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    options = {**TWO_STEPS, "dataset.valid_split": None, **options}
    pretrain(tiny_data, tmp_path, options, quiet=False)

    text = tmp_path.joinpath("logs", "rank_0.log").read_text()

    assert "Running on 1 process(es)." in text
    assert [
        line.partition(" - ")[2]
        for line in text.splitlines()
        if "reed memory" in line or "`keep_freed_memory`" in line
    ] == lines


def _pretrain_until_killed(data: TinyData, output_dir: Path) -> None:
    set_unit_step_nr = CausalLMTrainUnit.set_step_nr

    def set_step_nr(self: CausalLMTrainUnit, step_nr: int) -> None:
        set_unit_step_nr(self, step_nr)

        if step_nr in (5, 6):
            # Lets the checkpoint be written in the background.
            time.sleep(0.5)

        if step_nr == 7:
            assert output_dir.joinpath("checkpoints", "step_4").exists()

            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(CausalLMTrainUnit, "set_step_nr", set_step_nr)

        pretrain(data, output_dir)


def test_killed_run_continues_with_the_same_losses(
    tiny_data: TinyData, pretrained_dir: Path, tmp_path: Path
) -> None:
    process = get_context("fork").Process(
        target=_pretrain_until_killed, args=(tiny_data, tmp_path)
    )
    process.start()
    process.join(timeout=60)

    assert process.exitcode == -signal.SIGKILL

    pretrain(tiny_data, tmp_path)

    train = read_metrics(tmp_path, "train")

    assert [m["Step"] for m in train] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]

    expected = {m["Step"]: m for m in read_metrics(pretrained_dir, "train")}

    for metrics in train:
        assert _without_times(metrics) == _without_times(expected[metrics["Step"]])

    last_valid = [read_metrics(d, "valid")[-1] for d in (tmp_path, pretrained_dir)]

    assert _without_times(last_valid[0]) == _without_times(last_valid[1])


def test_finished_run_is_not_run_again(
    tiny_data: TinyData, pretrained_dir: Path
) -> None:
    before = read_metrics(pretrained_dir, "train")

    pretrain(tiny_data, pretrained_dir, {"regime.keep_last_n_checkpoints": 2})

    assert read_metrics(pretrained_dir, "train") == before


def test_other_model_in_the_output_directory_is_refused(
    tiny_data: TinyData, pretrained_dir: Path
) -> None:
    file = pretrained_dir / "checkpoints" / "model.yaml"

    before = file.read_text()

    with pytest.raises(RecipeError, match="holds a training run of another model"):
        pretrain(tiny_data, pretrained_dir, {"model.family": "xlstm"})

    assert file.read_text() == before


@pytest.mark.parametrize("family", ["xlstm", "gemma2", "qwen_moe"])
def test_baselines_train(tiny_data: TinyData, tmp_path: Path, family: str) -> None:
    pretrain(
        tiny_data,
        tmp_path,
        {"model.family": family, "regime.num_steps": 5, "dataset.valid_split": None},
    )

    train = read_metrics(tmp_path, "train")

    assert train[-1]["NLL Loss"] < train[0]["NLL Loss"]
    assert ("Load Balance Loss" in train[0]) == (family == "qwen_moe")
    assert not tmp_path.joinpath("metrics", "valid.jsonl").exists()


def test_model_that_does_not_fit_the_tokenizer_is_refused(
    tiny_data: TinyData, tmp_path: Path
) -> None:
    overrides: dict[str, object] = {"model.config_overrides": {"pad_idx": 5}}

    with pytest.raises(RecipeError, match="`pad_idx` of the model must be that"):
        pretrain(tiny_data, tmp_path, overrides)


def test_invalid_configuration_is_refused(tiny_data: TinyData, tmp_path: Path) -> None:
    overrides = {"lr_scheduler.config.num_warmup_steps": 8}

    with pytest.raises(ValidationError, match="the cosine would have no length"):
        pretrain(tiny_data, tmp_path, overrides)
