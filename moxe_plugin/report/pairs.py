"""Tests of each system against each other, on the same items and seeds.

Systems are tested against the best guess too, apart from the others: it has no seeds,
so each seed of a system is compared with the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Final, Literal

import numpy as np

from moxe_plugin.report.columns import COLUMNS
from moxe_plugin.report.measurements import Column
from moxe_plugin.report.rows import Row
from moxe_plugin.report.scores import describe_overlap
from moxe_plugin.report.statistics import (
    Estimate,
    MissingNumberError,
    Resampled,
    adjust_holm,
    estimate_resampled,
    estimate_samples,
)

LEVEL: Final = 0.05
"""The level of the tests, after Holm's adjustment over the pairs of a metric."""

Basis = Literal["items and seeds", "seeds"]
Verdict = Literal["better", "worse", "not decided"]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The difference between two systems in one metric."""

    first: Row
    second: Row
    basis: Basis | None
    """What the uncertainty is over; ``None`` if there is no estimate."""

    seeds: Sequence[int]
    """The seeds that both have; no other enters."""

    num_items: int | None
    """The items, if the uncertainty is over them too."""

    estimate: Estimate | None
    """``first`` minus ``second`` with its 95 % interval, in the column's ``unit``."""

    p_value: float | None
    """Of the two-sided test that there is no difference."""

    adjusted_p_value: float | None
    """The same by Holm's method over all pairs of this metric in this table."""

    reason: str | None
    """Why there is no estimate."""

    verdict: Verdict
    """Whether ``first`` is the better one: decided only if the adjusted p-value is
    below 0.05 and the interval excludes 0."""


@dataclass(frozen=True, kw_only=True)
class MetricPairs:
    """All pairs of systems in one metric."""

    column: Column
    pairs: Sequence[Pair]
    """In the order of rows by the metric, best first."""

    leader: Row
    """The row with the best mean."""

    not_beaten: Sequence[Row]
    """The rows that the leader is not shown to be better than."""

    notes: Sequence[str]
    """Why pairs have no estimate; each reason once."""

    guess_pairs: Sequence[Pair]
    """Each system, as ``first``, against the best guess; Holm's method over these. None
    if no guess has the metric."""


def compare_rows(rows: Sequence[Row]) -> list[MetricPairs]:
    """Test each trained system against each other.

    :param rows: The rows of a comparison, guesses included.

    :returns: One entry for each metric that two rows have.
    """
    metrics = []

    for column in COLUMNS:
        present = [row for row in rows if column.key in row.statistics]

        if column.compared and sum(not row.is_guess for row in present) > 1:
            metrics.append(_compare_metric(column, present))

    return metrics


def _compare_metric(column: Column, rows: Sequence[Row]) -> MetricPairs:
    sign = 1.0 if column.lower_is_better else -1.0
    order = sorted(rows, key=lambda row: sign * row.statistics[column.key].mean)

    ranked = [row for row in order if not row.is_guess]
    best_guess = [row for row in order if row.is_guess][:1]

    pairs = _judge(
        [_pair_rows(column, *both) for both in combinations(ranked, 2)], sign
    )
    guess_pairs = _judge(
        [_pair_rows(column, *both) for both in product(ranked, best_guess)], sign
    )

    leader = ranked[0]
    beaten = {
        id(pair.second)
        for pair in pairs
        if pair.first is leader and pair.verdict == "better"
    }

    return MetricPairs(
        column=column,
        pairs=pairs,
        leader=leader,
        not_beaten=[row for row in ranked[1:] if id(row) not in beaten],
        notes=_explain([*pairs, *guess_pairs]),
        guess_pairs=guess_pairs,
    )


def _explain(pairs: Sequence[Pair]) -> list[str]:
    by_reason: dict[str, list[str]] = {}

    for pair in pairs:
        if pair.reason is not None:
            names = f"{pair.first.label} and {pair.second.label}"
            by_reason.setdefault(pair.reason, []).append(names)

    return [
        ("All pairs" if len(names) == len(pairs) else "; ".join(names)) + f": {reason}."
        for reason, names in by_reason.items()
    ]


def _pair_rows(column: Column, first: Row, second: Row) -> Pair:
    seeds = first.seeds
    if not second.is_guess:
        seeds = sorted(set(seeds) & set(second.seeds))

    pair = Pair(
        first=first,
        second=second,
        basis=None,
        seeds=seeds,
        num_items=None,
        estimate=None,
        p_value=None,
        adjusted_p_value=None,
        reason=None,
        verdict="not decided",
    )

    try:
        estimate, num_items = _estimate(column, first, second, seeds)
    except MissingNumberError as ex:
        return replace(pair, reason=str(ex))

    return replace(
        pair,
        basis="seeds" if num_items is None else "items and seeds",
        num_items=num_items,
        estimate=estimate,
        p_value=estimate.p_value(0.0),
    )


def _estimate(
    column: Column, first: Row, second: Row, seeds: Sequence[int]
) -> tuple[Estimate, int | None]:
    if len(seeds) < 2:
        raise MissingNumberError(
            f"two seeds in common are needed, there are {len(seeds)}"
        )

    scored = [row.scored_items.get(column.key) for row in (first, second)]

    if scored == [None, None]:
        return estimate_samples(_differences(column, first, second, seeds)), None

    if scored[0] is None or scored[1] is None:
        lacking = first if scored[0] is None else second

        raise MissingNumberError(f"{lacking.label} has no items to pair")

    if scored[0].items != scored[1].items:
        overlap = describe_overlap(scored[0].items, scored[1].items)

        raise MissingNumberError(f"scored on different items ({overlap}), not paired")

    terms = [
        (factor, _pick_seeds(row, values.values, seeds))
        for factor, row, values in zip(
            (1.0, -1.0), (first, second), scored, strict=True
        )
        if values is not None
    ]

    num_items = len(scored[0].items)

    return estimate_resampled(terms, num_items), num_items


def _differences(
    column: Column, first: Row, second: Row, seeds: Sequence[int]
) -> list[float]:
    values = []

    for row in (first, second):
        numbers = [column.read(record) for record in row.records]
        values.append([numbers[idx] for idx in _find_seeds(row, seeds)])

    return [
        column.to_scale(a) - column.to_scale(b)
        for a, b in zip(*values, strict=True)
        if a is not None and b is not None
    ]


def _pick_seeds(row: Row, resampled: Resampled, seeds: Sequence[int]) -> Resampled:
    indices = np.array(_find_seeds(row, seeds), dtype=np.intp)

    return Resampled(resampled.values[indices], resampled.resamples[:, indices])


def _find_seeds(row: Row, seeds: Sequence[int]) -> list[int]:
    # A guess is the same for all seeds.
    return [0 if row.is_guess else row.seeds.index(seed) for seed in seeds]


def _judge(pairs: Sequence[Pair], sign: float) -> list[Pair]:
    adjusted = iter(
        adjust_holm([pair.p_value for pair in pairs if pair.p_value is not None])
    )

    judged = []

    for pair in pairs:
        if pair.estimate is None:
            judged.append(pair)
            continue

        p_value = next(adjusted)
        verdict: Verdict = "not decided"

        excludes_zero = pair.estimate.low > 0.0 or pair.estimate.high < 0.0
        if p_value < LEVEL and excludes_zero:
            verdict = "better" if sign * pair.estimate.value < 0.0 else "worse"

        judged.append(replace(pair, adjusted_p_value=p_value, verdict=verdict))

    return judged
