"""How long a suite will take and how much it computes, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from moxe_plugin.bench.plan import RunPlan, StagePlan
from moxe_plugin.bench.stage_state import hash_config
from moxe_plugin.report.records import RunRecord

_BACKWARD_FACTOR: Final = 3
"""Forward and backward passes take three times the FLOPs of a forward pass."""


class StepCost(NamedTuple):
    """What a training step of a stage costs."""

    flops_per_token: int
    """Useful FLOPs of a token's forward pass."""

    tokens_per_s: float
    """Tokens over the time of a step."""


class Estimate(NamedTuple):
    """What a stage will cost."""

    flops: float | None
    """Useful FLOPs of training, forwards and backwards; ``None`` without training."""

    seconds: float | None
    """The time, if known."""

    source: str
    """Where the time comes from: ``recorded`` for the same recipe on the same machine,
    or ``measured``: one step on this machine, without validation and checkpoints."""


def step_key(stage: StagePlan) -> str:
    """Name what the cost of a training step depends on.

    :param stage: The training stage.

    :returns: A key.
    """
    section = stage.config["dataset"]

    return hash_config(
        [stage.config.get("model"), section["seq_len"], section["batch_size"]]
    )


def list_steps(plans: Sequence[RunPlan]) -> dict[str, StagePlan]:
    """List the different training steps of a suite.

    :param plans: The runs.

    :returns: A stage of each by :func:`step_key`. Finetuning has none of its own: it
        trains the model of its pretraining.
    """
    return {
        step_key(stage): stage
        for plan in plans
        for stage in plan.stages
        if stage.name == "pretrain"
    }


def count_tokens(stage: StagePlan) -> int:
    """Count the tokens of a training stage, padding included.

    :param stage: The stage.

    :returns: The number of tokens of all steps.
    """
    section = stage.config["dataset"]
    num_accumulate = stage.config["trainer"]["grad_accumulation"]["num_batches"]
    tokens: int = section["seq_len"] * section["batch_size"] * num_accumulate

    return tokens * (stage.num_steps or 0)


def estimate_stage(
    plan: RunPlan,
    stage: StagePlan,
    costs: Mapping[str, StepCost],
    records: Sequence[RunRecord],
) -> Estimate:
    """Estimate what a stage will cost.

    :param plan: The run.
    :param stage: One of its stages.
    :param costs: What training steps cost, by :func:`step_key`.
    :param records: Earlier runs on this machine.

    :returns: The estimate.
    """
    seconds = [
        record.environment.wall_s[stage.name]
        for record in records
        if record.environment.recipe_sha256 == plan.recipe_sha256
        and stage.name in record.environment.wall_s
    ]
    mean_s = sum(seconds) / len(seconds) if seconds else None

    if stage.num_steps is None:
        return Estimate(None, mean_s, "recorded")

    cost = costs[step_key(plan.stages[0])]
    tokens = count_tokens(stage)
    flops = float(_BACKWARD_FACTOR * cost.flops_per_token * tokens)

    if mean_s is not None:
        return Estimate(flops, mean_s, "recorded")

    return Estimate(flops, tokens / cost.tokens_per_s, "measured")


def describe(estimate: Estimate) -> str:
    """Write an estimate in words.

    :param estimate: The estimate.

    :returns: For example ``1.2e+12 FLOPs, about 3 min (measured)``.
    """
    parts = []

    if estimate.flops is not None:
        parts.append(f"{estimate.flops:.2g} FLOPs")

    if estimate.seconds is not None:
        parts.append(f"about {format_time(estimate.seconds)} ({estimate.source})")

    return ", ".join(parts)


def format_time(seconds: float) -> str:
    """Write a time for people.

    :param seconds: The time.

    :returns: For example ``40 s``, ``3 min`` or ``1.5 h``.
    """
    if seconds < 100:
        return f"{seconds:.0f} s"

    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
