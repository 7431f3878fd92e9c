"""A row of a table: the runs of one system, their numbers, and what marks them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pandas as pd

from moxe_plugin.report.columns import COLUMNS
from moxe_plugin.report.measurements import Column
from moxe_plugin.report.records import Code, RunRecord
from moxe_plugin.report.scores import has_columns, stack_runs
from moxe_plugin.report.statistics import (
    Array,
    MissingNumberError,
    Resampled,
    draw_weights,
    interval_over_items,
    resample_ratio,
)


class Statistic(NamedTuple):
    """A number over the runs of a row."""

    mean: float
    sd: float | None
    """Sample standard deviation over seeds; ``None`` for a single run."""

    num_runs: int
    """Runs that have the number."""

    low: float | None = None
    """Lower end of the 95 % interval over items, the models being as they are; ``None``
    for what is not made of items, or if runs lack them."""

    high: float | None = None
    """Its upper end."""

    num_items: int | None = None
    """Items that the interval is over."""


class ScoredItems(NamedTuple):
    """What the seeds of a row got on all items and on resampled ones."""

    items: tuple[str, ...]
    values: Resampled
    """On the scale of comparison; seeds in the order of the row's records."""


# Rows are told apart by identity: arrays have no truth value.
@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """The runs of one system that differ in their seed only."""

    system: str
    label: str
    records: Sequence[RunRecord]
    """One a seed, sorted by it."""

    statistics: Mapping[str, Statistic]
    """By key of the column; a missing number has no entry."""

    scored_items: Mapping[str, ScoredItems] = field(default_factory=dict, repr=False)
    """By key of the column; no entry if a run has no items, or other ones."""

    marks: Sequence[str] = ()
    """What stands beside the label: in which respect, other than the seed, its runs
    differ from each other, or from those of other rows."""

    notes: Sequence[str] = ()
    """What else a reader must know of this row."""

    @property
    def is_guess(self) -> bool:
        """Whether nothing was trained for this row."""
        return self.records[0].environment.kind == "guess"

    @property
    def run_names(self) -> list[str]:
        """The directories that the row's numbers come from."""
        return [record.name for record in self.records]

    @property
    def seeds(self) -> list[int]:
        """The seeds of the runs; none for a guess."""
        seeds = [record.environment.seed for record in self.records]

        return [seed for seed in seeds if seed is not None and not self.is_guess]

    @property
    def marked_label(self) -> str:
        """The label with its marks."""
        return " ".join([self.label, *(f"[{mark}]" for mark in self.marks)])


class ItemWeights:
    """The bootstrap's weights by number of items, each drawn once."""

    def __init__(self) -> None:
        self._weights: dict[int, Array] = {}

    def of(self, num_items: int) -> Array:
        """Return the weights.

        :param num_items: The number of items.

        :returns: As :func:`~moxe_plugin.report.statistics.draw_weights`.
        """
        if num_items not in self._weights:
            self._weights[num_items] = draw_weights(num_items)

        return self._weights[num_items]


def create_row(records: Sequence[RunRecord], weights: ItemWeights) -> Row:
    """Sum up the runs of a system.

    :param records: The runs, which differ in their seed only.
    :param weights: The bootstrap's weights.

    :returns: The row.
    """
    records = sorted(records, key=lambda r: (r.environment.seed or 0, r.name))

    scored_items, notes = _score_items(records, weights)

    frame = pd.DataFrame(
        [{c.key: c.read(record) for c in COLUMNS} for record in records],
        dtype="float64",
    )

    statistics = {
        column.key: _sum_up(frame[column.key].dropna(), column, scored_items)
        for column in COLUMNS
        if frame[column.key].notna().any()
    }

    return Row(
        system=records[0].environment.system,
        label=records[0].environment.label,
        records=records,
        statistics=statistics,
        scored_items=scored_items,
        marks=_find_marks(records),
        notes=notes,
    )


def describe_codes(records: Iterable[RunRecord]) -> list[str]:
    """Name the code that runs come from.

    :param records: The runs.

    :returns: Each version and commit once, sorted.
    """
    codes = {_describe_code(record.environment.code) for record in records}

    return sorted(codes)


def _describe_code(code: Code) -> str:
    return f"{code.version} ({code.commit or 'no commit'})"


def _score_items(
    records: Sequence[RunRecord], weights: ItemWeights
) -> tuple[dict[str, ScoredItems], list[str]]:
    scored_items: dict[str, ScoredItems] = {}
    notes: dict[str, None] = {}

    for column in COLUMNS:
        score = column.score
        if score is None or not any(
            score.task in record.items and has_columns(record.items[score.task], score)
            for record in records
        ):
            continue

        try:
            items, ratio = stack_runs(records, score)
            resampled = resample_ratio(ratio, weights.of(len(items)))
        except MissingNumberError as ex:
            notes[f"No interval over items: {ex}."] = None
        else:
            scored_items[column.key] = ScoredItems(items, resampled)

    return scored_items, list(notes)


def _sum_up(
    values: pd.Series[float],
    column: Column,
    scored_items: Mapping[str, ScoredItems],
) -> Statistic:
    statistic = Statistic(
        mean=float(values.mean()),
        sd=float(values.std(ddof=1)) if len(values) > 1 else None,
        num_runs=len(values),
    )

    scored = scored_items.get(column.key)
    if scored is None:
        return statistic

    low, high = interval_over_items(scored.values, column.from_scale)

    return statistic._replace(low=low, high=high, num_items=len(scored.items))


def _find_marks(records: Sequence[RunRecord]) -> list[str]:
    environments = [record.environment for record in records]

    marks = []

    if len(codes := describe_codes(records)) > 1:
        marks.append(f"mixed code: {', '.join(codes)}")

    if any(e.code.dirty for e in environments):
        marks.append("code with uncommitted changes")

    if len({tuple(sorted(e.versions.items())) for e in environments}) > 1:
        marks.append("mixed versions of packages")

    if len({e.hardware for e in environments}) > 1:
        marks.append("mixed machines")

    if any(column.disagrees(record) for column in COLUMNS for record in records):
        marks.append("items disagree with results")

    return marks
