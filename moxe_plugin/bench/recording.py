"""Turns a finished run of the work directory into a run record."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml

from moxe_plugin.bench.machine import describe_code, describe_hardware, list_versions
from moxe_plugin.bench.metrics import (
    TrainingSums,
    read_train_metrics,
    read_valid_metrics,
    sum_up,
)
from moxe_plugin.bench.plan import RunPlan
from moxe_plugin.bench.stage_state import StageState, read_state
from moxe_plugin.report.files import DamagedRecordError
from moxe_plugin.report.items import make_task_items
from moxe_plugin.report.records import Data, Environment, ModelInfo, RunRecord
from moxe_plugin.report.run_dirs import find_run_dirs, read_run, write_run


def find_records(results_dir: Path) -> dict[str, RunRecord]:
    """Find the readable records of a results directory.

    :param results_dir: The directory; it need not exist.

    :returns: Records by the hash of their configuration.
    """
    records = {}

    if results_dir.is_dir():
        for run_dir in find_run_dirs(results_dir):
            try:
                record = read_run(run_dir)
            except DamagedRecordError:
                # The tables name it; here it only means that the run is not recorded.
                continue

            records[record.environment.config_sha256] = record

    return records


def record_run(
    plan: RunPlan, suite: str, results_dir: Path, day: date, num_jobs: int
) -> Path:
    """Write the record of a run whose stages are all done.

    :param plan: The run.
    :param suite: The name of the suite.
    :param results_dir: The directory of records.
    :param day: The date in the name of the record.
    :param num_jobs: How many runs shared the machine.

    :returns: The record's directory.
    """
    states: dict[str, StageState] = {}
    for stage in plan.stages:
        state = read_state(stage.state_file)
        assert state is not None

        states[stage.name] = state

    last = states[plan.stages[-1].name]
    model = last.result.get("model")

    # Nothing is trained for a guess; it is evaluated on the cpu.
    first = states[plan.stages[0].name].result
    hardware = describe_hardware(
        first["device"], first["device_name"], first["num_threads"], num_jobs
    )

    parts = [plan.system, plan.data["name"], hardware.name, f"{day:%Y%m%d}"]
    if plan.seed is not None:
        parts.append(f"s{plan.seed}")

    train, valid, sums = _read_metrics(plan)

    environment = Environment(
        kind="guess" if plan.is_guess else "trained",
        suite=suite,
        system=plan.system,
        label=plan.label,
        seed=plan.seed,
        config_sha256=plan.config_sha256,
        recipe_sha256=plan.recipe_sha256,
        hardware=hardware,
        code=describe_code(),
        versions=list_versions(),
        data=Data(**plan.data),
        training_tokens=sums["pretrain"].num_tokens,
        finetuning_tokens=sums["finetune"].num_tokens,
        throughput_tokens_per_s=sums["pretrain"].tokens_per_s,
        peak_memory_gib=None if plan.is_guess else first["peak_memory_gib"],
        wall_s={name: round(state.elapsed_s, 3) for name, state in states.items()},
    )

    record = RunRecord(
        name=_free_name(results_dir, "_".join(parts), plan.config_sha256),
        environment=environment,
        model=None if model is None else ModelInfo(**model),
        train=train,
        valid=valid,
        evals=last.result["evals"],
        items={
            task: make_task_items(values)
            for task, values in last.result.get("items", {}).items()
        },
    )

    config_yaml = None if plan.is_guess else _config_yaml(plan)

    return write_run(results_dir, record, config_yaml)


def _free_name(results_dir: Path, name: str, config_sha256: str) -> str:
    # A record of another configuration, made the same day, must stay.
    taken = {
        record.name
        for sha256, record in find_records(results_dir).items()
        if sha256 != config_sha256
    }

    names = [name, *(f"{name}-{number}" for number in range(2, len(taken) + 3))]

    return next(n for n in names if n not in taken)


def _read_metrics(
    plan: RunPlan,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Mapping[str, TrainingSums]]:
    train, valid = [], []
    sums = {name: TrainingSums(None, None) for name in ("pretrain", "finetune")}

    for stage in plan.stages:
        if stage.name in sums:
            lines = read_train_metrics(stage.output_dir, stage.name)
            sums[stage.name] = sum_up(lines)

            train += lines
            valid += read_valid_metrics(stage.output_dir, stage.name)

    return train, valid, sums


def _config_yaml(plan: RunPlan) -> str:
    parts = []

    for stage in plan.stages:
        # What fairseq2 resolved says more than our own copy of the preset. Its text is
        # kept as it is: PyYAML would read fairseq2's `off` as false.
        file = stage.output_dir / "config.yaml"
        if file.exists():
            text = file.read_text(encoding="utf-8")
        else:
            text = yaml.safe_dump(dict(stage.config))

        parts.append(f"{stage.name}:\n{indent(text, '  ')}")

    return "".join(parts)
