"""What the rows of a suite say together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from moxe_plugin.models.moxe.config import MOXE_FAMILY
from moxe_plugin.speed.records import SpeedRow


def moxe_ratio(row: SpeedRow, rows: Sequence[SpeedRow]) -> float | None:
    """Compare a row with MoxE.

    :param row: The row.
    :param rows: Where MoxE is looked for: the first row of its family that was measured
        at the same.

    :returns: Tokens a second of MoxE over those of the row; ``None`` if either was not
        measured.
    """
    moxe = next(
        (r for r in rows if r.family == MOXE_FAMILY and _setting(r) == _setting(row)),
        None,
    )

    if moxe is None or moxe.tokens_per_s is None or row.tokens_per_s is None:
        return None

    return moxe.tokens_per_s / row.tokens_per_s


def list_remarks(rows: Sequence[SpeedRow]) -> list[str]:
    """List what rows say together.

    :param rows: The rows of a suite.

    :returns: Sentences in Markdown: of each system that was measured with our products,
        too, how it compares with MoxE both ways; of MoxE with few experts and with
        many, how much of the difference the memory's speed explains.
    """
    return [*_compare_linear(rows), *_compare_experts(rows)]


def format_phase(row: SpeedRow) -> str:
    """Name what was timed.

    :param row: The row.

    :returns: Its phase, with what belongs to it.
    """
    parts = [row.phase]

    if row.optimizer:
        parts.append("+ AdamW")
    if row.checkpoint_layers:
        parts.append("(checkpointed)")

    return " ".join(parts)


def list_changes(row: SpeedRow) -> dict[str, object]:
    """List what tells a row from the others of its architecture.

    :param row: The row.

    :returns: What was changed, by name.
    """
    changes: dict[str, object] = dict(row.overrides)

    if row.router_skew:
        changes["router_skew"] = row.router_skew
    if row.linear != "own":
        changes["linear"] = row.linear

    if row.captured:
        changes["captured"] = row.captured

    if row.implementation != "own":
        changes["implementation"] = row.implementation

    return changes


def _setting(row: SpeedRow) -> tuple[object, ...]:
    return (
        *(row.suite, row.device, row.dtype),
        *(row.phase, row.batch, row.length, row.optimizer),
    )


def _compare_linear(rows: Sequence[SpeedRow]) -> Iterator[str]:
    for swapped in rows:
        if swapped.linear != "swapped":
            continue

        own = next(
            r
            for r in rows
            if (r.linear, r.family, r.arch, _setting(r))
            == ("own", swapped.family, swapped.arch, _setting(swapped))
        )

        ratios = [moxe_ratio(row, rows) for row in (own, swapped)]
        if None in ratios:
            continue

        yield (
            f"`{own.family}` `{own.arch}`, {format_phase(own)}, {own.batch} x "
            f"{own.length}: MoxE is {ratios[0]:.2f} times as fast as it is, and "
            f"{ratios[1]:.2f} times as it is with our products."
        )


def _compare_experts(rows: Sequence[SpeedRow]) -> Iterator[str]:
    counted = [row for row in rows if "num_experts" in row.overrides]

    for _, group in groupby(counted, key=_setting):
        by_count = sorted(group, key=lambda row: row.overrides["num_experts"])
        few, many = by_count[0], by_count[-1]

        times = [
            (row.seconds, row.least_memory_seconds, row.new_gradient_seconds)
            for row in (few, many)
        ]
        if few is many or any(None in x for x in times):
            continue

        step, weights, gradients = (
            y - x
            for x, y in zip(*times, strict=True)
            if x is not None and y is not None
        )
        yield (
            f"{few.overrides['num_experts']} to {many.overrides['num_experts']} "
            f"experts, {format_phase(few)}, {few.batch} x {few.length}: a step takes "
            f"{step:.3g} s more. Weights take at least {weights:.2g} s more, gradients "
            f"in new memory {gradients:.2g} s."
        )
