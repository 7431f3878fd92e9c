"""What was measured, as the JSON file holds it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moxe_plugin.report.files import write_json


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """A measured case; what is ``None`` could not be measured, or does not apply.

    The fields up to ``optimizer``, ``linear``, ``captured`` and ``implementation`` are
    those of :class:`~moxe_plugin.speed.suites.SpeedCase`.
    """

    suite: str
    family: str
    arch: str
    overrides: Mapping[str, int]
    phase: str
    batch: int
    length: int
    optimizer: bool

    device: str
    """Where it was computed."""

    dtype: str
    """``float32``, ``bfloat16`` or ``autocast``."""

    repeats: int
    """How many calls were timed."""

    warm_up: int
    """How many calls went before them."""

    seed: int
    """Seeded parameters and token ids."""

    checkpoint_layers: bool = False
    """Whether training kept the inputs of layers only."""

    linear: str = "own"

    captured: bool = False

    implementation: str = "own"

    router_skew: float = 0.0
    """The standard deviation of offsets that routers prefer some experts by."""

    busiest_expert_share: float | None = None
    """The share of its layer's load that the busiest expert got in the warm-up, the
    mean over layers; of MoxE only."""

    num_parameters: int | None = None
    """All parameters of the model."""

    tokens: int | None = None
    """Tokens of a call."""

    seconds: float | None = None
    """Seconds of a call: the median."""

    seconds_all: Sequence[float] = ()
    """Seconds of each call."""

    tokens_per_s: float | None = None
    """``tokens`` over ``seconds``."""

    useful_gflop: float | None = None
    """Useful FLOPs of a call, in 1e9, without those of the optimizer."""

    peak_fraction: float | None = None
    """Useful FLOPs a second over those of a product of two matrices by the fastest
    library."""

    least_memory_seconds: float | None = None
    """See :func:`~moxe_plugin.speed.limits.least_memory_seconds`; training only."""

    new_gradient_seconds: float | None = None
    """See :func:`~moxe_plugin.speed.limits.new_gradient_seconds`; training only."""

    peak_memory_gib: float | None = None
    """The most memory that was in use in timed calls: resident memory of the whole
    process on the CPU, allocated tensors on an accelerator."""

    baseline_memory_gib: float | None = None
    """Memory in use before the model was made."""

    state_bytes: int | None = None
    """The state that ``length`` tokens leave, of the whole batch."""


def pool_rows(rows: Sequence[SpeedRow]) -> SpeedRow:
    """Put together what was measured of a case at several times.

    :param rows: The measurements of it, one at least.

    :returns: The same, of all calls; one that could not be measured, if there is one.
    """
    if len(rows) == 1:
        return rows[0]

    for row in rows:
        if row.seconds is None or row.tokens is None:
            return row

    seconds_all = [seconds for row in rows for seconds in row.seconds_all]
    seconds = statistics.median(seconds_all)
    first = rows[0]
    assert first.tokens is not None
    assert first.seconds is not None
    peaks = [x.peak_memory_gib for x in rows if x.peak_memory_gib is not None]
    fraction = first.peak_fraction

    return replace(
        first,
        repeats=len(seconds_all),
        warm_up=sum(row.warm_up for row in rows),
        seconds=seconds,
        seconds_all=seconds_all,
        tokens_per_s=first.tokens / seconds,
        peak_fraction=None if fraction is None else fraction * first.seconds / seconds,
        peak_memory_gib=max(peaks, default=None),
    )


def write_speed_json(
    file: Path, machine: Mapping[str, Any], rows: Sequence[SpeedRow]
) -> None:
    """Write the measurements.

    :param file: The file.
    :param machine: What :func:`~moxe_plugin.speed.measuring.describe_machine` returned.
    :param rows: The rows.
    """
    file.parent.mkdir(parents=True, exist_ok=True)

    write_json(file, {"machine": dict(machine), "rows": [asdict(row) for row in rows]})
