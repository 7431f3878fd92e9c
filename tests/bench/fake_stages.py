"""Stages that train nothing: they write what a real stage would, and count calls."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moxe_plugin.bench.plan import StagePlan, run_key
from moxe_plugin.bench.suite import Suite
from tests.report.synthetic import DATA

_DEVICE = {"device": "cpu", "device_name": None, "num_threads": 2}


def count_calls(run_dir: Path, stage: str) -> int:
    file = run_dir / f"{stage}.calls"

    return len(file.read_text()) if file.exists() else 0


def resolve(suite: Suite) -> dict[str, Any]:
    configs: dict[str, Any] = {}

    for system in suite.systems:
        for seed in suite.seeds:
            config = {
                "regime": {"num_steps": 20, **suite.pretrain_config},
                "common": {"seed": seed},
                "dataset": {"seq_len": 50, "batch_size": 2},
                "trainer": {"grad_accumulation": {"num_batches": 1}},
                "tokenizer": {},
            }
            key = run_key(system, seed)
            configs[key] = {"pretrain": config}
            if system.finetune is not None:
                configs[key]["finetune"] = config

    return {
        "configs": configs,
        "data": {key: asdict(DATA) for key in configs},
        "tasks": [],
    }


def measure_steps(stages: Mapping[str, StagePlan]) -> dict[str, Any]:
    cost = {"flops_per_token": 1000, "tokens_per_s": 10.0}

    return {"steps": dict.fromkeys(stages, cost), **_DEVICE}


def train(stage: StagePlan) -> dict[str, Any]:
    _note_call(stage)

    metrics_dir = stage.output_dir / "metrics"
    metrics_dir.mkdir(parents=True, exist_ok=True)

    with (metrics_dir / "train.jsonl").open("a") as file:
        for step in (10, 20):
            line = {
                "Step": step,
                "NLL Loss": 5.0 - step / 10,
                "Number of Target Elements": 1000,
                "Total Number of Target Elements": 100 * step,
                "Data Time": 0.5,
                "Compute Time": 1.5,
            }
            file.write(json.dumps(line) + "\n")

    with (metrics_dir / "valid.jsonl").open("w") as file:
        file.write(json.dumps({"Step": 20, "NLL Loss": 3.5}) + "\n")

    return dict(_DEVICE)


def train_killed_once(stage: StagePlan) -> dict[str, Any]:
    if count_calls(stage.run_dir, stage.name) == 0:
        _note_call(stage)

        metrics_dir = stage.output_dir / "metrics"
        metrics_dir.mkdir(parents=True)
        (metrics_dir / "train.jsonl").write_text('{"Step": 10, "NLL Loss": 4.0}\n{"St')

        os.kill(os.getpid(), signal.SIGKILL)

    return train(stage)


def train_on_gpu(stage: StagePlan) -> dict[str, Any]:
    stage.run_dir.joinpath("gpu").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    # Long enough for the other run to begin.
    time.sleep(1.0)

    return train(stage)


def train_failing(stage: StagePlan) -> dict[str, Any]:
    raise RuntimeError(f"the {stage.name} of {stage.run_dir.name} went wrong")


def train_for_ever(stage: StagePlan) -> dict[str, Any]:
    stage.run_dir.mkdir(parents=True, exist_ok=True)
    stage.run_dir.joinpath("pid").write_text(str(os.getpid()))

    while True:
        time.sleep(0.1)


def evaluate(stage: StagePlan) -> dict[str, Any]:
    _note_call(stage)

    model = {
        "family": "moxe",
        "arch": "tiny",
        "num_parameters": 1000,
        "num_active_parameters": 400,
    }

    return {
        "evals": {"pretrained": {"results": {}}},
        "items": {
            "last_word": {
                "item": ["a", "b"],
                "logprob": [-1.25, -2],
                "num_tokens": [1, 2],
                "is_greedy": [0, 1],
            }
        },
        "model": model,
        **_DEVICE,
    }


def guess(stage: StagePlan) -> dict[str, Any]:
    _note_call(stage)

    return {"evals": {"guess": {"valid_loss_nats": 7.0}}, "items": {}, **_DEVICE}


def _note_call(stage: StagePlan) -> None:
    stage.run_dir.mkdir(parents=True, exist_ok=True)

    with (stage.run_dir / f"{stage.name}.calls").open("a") as file:
        file.write("x")
