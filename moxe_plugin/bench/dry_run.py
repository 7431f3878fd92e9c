"""Prints what a suite has to do, and what it will cost."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from moxe_plugin.bench.estimate import (
    StepCost,
    describe,
    estimate_stage,
    format_time,
)
from moxe_plugin.bench.machine import Jobs, describe_hardware
from moxe_plugin.bench.plan import RunPlan, StagePlan
from moxe_plugin.bench.recording import find_records
from moxe_plugin.bench.stage_state import read_state
from moxe_plugin.report.records import RunRecord


def print_plan(
    console: Console,
    plans: Sequence[RunPlan],
    results_dir: Path,
    measured: Mapping[str, Any],
    jobs: Jobs,
) -> None:
    """Print every stage with its state, command and estimated cost, and the sum.

    :param console: Where to print.
    :param plans: The runs.
    :param results_dir: Where records are.
    :param measured: As :func:`~moxe_plugin.bench.stages.measure_steps` returns it.
    :param jobs: How runs share the machine.
    """
    costs = {key: StepCost(**cost) for key, cost in measured["steps"].items()}
    hardware = describe_hardware(
        measured["device"],
        measured["device_name"],
        measured["num_threads"],
        jobs.num_jobs,
    )

    records = find_records(results_dir)
    comparable = [r for r in records.values() if r.environment.hardware == hardware]

    flops = seconds = 0.0
    num_unknown = 0

    for plan in plans:
        record = records.get(plan.config_sha256)

        for stage in plan.stages:
            status = _describe_status(stage, record)
            line = f"{plan.title}: {stage.name}: {status}"

            if record is None and status != "done":
                estimate = estimate_stage(plan, stage, costs, comparable)
                flops += estimate.flops or 0.0
                seconds += estimate.seconds or 0.0
                num_unknown += estimate.seconds is None

                if words := describe(estimate):
                    line += f"; {words}"

            console.print(line, markup=False, highlight=False, soft_wrap=True)

            if stage.argv:
                command = f"  fairseq2 {shlex.join(stage.argv)}"
                console.print(command, markup=False, highlight=False, soft_wrap=True)

    total = (
        f"In all: {flops:.2g} FLOPs of training, about "
        f"{format_time(seconds / jobs.num_jobs)} with {jobs.num_jobs} at a time"
    )
    if num_unknown:
        total += f"; without {num_unknown} stages whose time no earlier record tells"

    console.print(f"{total}.", markup=False, highlight=False, soft_wrap=True)


def _describe_status(stage: StagePlan, record: RunRecord | None) -> str:
    state = read_state(stage.state_file)

    if record is not None:
        return f"recorded in {record.name}"

    if state is None:
        return "to do"

    if state.config_sha256 != stage.config_sha256:
        return "begun with another configuration"

    return "done" if state.status == "done" else "to continue"
