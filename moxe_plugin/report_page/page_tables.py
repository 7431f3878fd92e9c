"""Tables of the page: what stands in a cell, and what it sorts by."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import pandas as pd

from moxe_plugin.report.cells import shown_columns
from moxe_plugin.report.comparison import Comparison
from moxe_plugin.report.formats import DASH
from moxe_plugin.report.measurements import Column
from moxe_plugin.report.pairs import MetricPairs
from moxe_plugin.report.rows import Row
from moxe_plugin.report_page.wording import find_ties

LEADER_MARK: Final = "★"
"""What marks the best mean of a metric, or all that are tied for it."""

RIVAL_MARK: Final = "?"
"""What marks the rows of which it is open whether the leader is better."""

_NUMBER: Final = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell."""

    text: str
    value: str | None = None
    """The number that it sorts by; ``None`` for text, or if there is none."""

    details: Sequence[str] = ()
    """Smaller lines below."""

    mark: str = ""


@dataclass(frozen=True, kw_only=True)
class Heading:
    """The head of a column."""

    text: str
    title: str = ""
    """What it means."""

    group: str = ""
    """The name of the group of columns; columns without one are always shown."""

    is_number: bool = False
    high_first: bool = False
    """Whether the first click puts the largest on top."""


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """A row."""

    cells: Sequence[Cell]
    filters: Mapping[str, str] = field(default_factory=dict)
    """Values of ``data-`` attributes that a filter selects by."""

    is_guess: bool = False


@dataclass(frozen=True, kw_only=True)
class PageTable:
    """A table that a reader can sort."""

    caption: str
    headings: Sequence[Heading]
    rows: Sequence[TableRow]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Neighbouring columns of the same group, and how many they are."""
        groups: list[tuple[str, int]] = []

        for heading in self.headings:
            if groups and groups[-1][0] == heading.group:
                groups[-1] = (heading.group, groups[-1][1] + 1)
            else:
                groups.append((heading.group, 1))

        return groups


def number_value(number: float) -> str:
    """Write a number for a sort, the same on every machine.

    :param number: The number.

    :returns: Ten digits.
    """
    return f"{number:.10g}"


def main_table(comparison: Comparison) -> PageTable:
    """List all rows of a comparison with all their numbers.

    :param comparison: The comparison.

    :returns: The table.
    """
    columns = shown_columns(comparison)
    metrics = {metric.column.key: metric for metric in comparison.pairs}

    headings = [Heading(text="system"), Heading(text="seeds")]
    headings += [
        Heading(
            text=column.heading + _arrow(column),
            title=column.meaning,
            group=column.group,
            is_number=True,
            high_first=column.lower_is_better is False,
        )
        for column in columns
    ]

    rows = [
        TableRow(
            cells=[
                Cell(text=row.label, details=row.marks),
                Cell(text=", ".join(map(str, row.seeds)) or DASH),
                *(_number_cell(row, c, metrics.get(c.key)) for c in columns),
            ],
            is_guess=row.is_guess,
        )
        for row in comparison.rows
    ]

    return PageTable(caption="All numbers", headings=headings, rows=rows)


def text_table(caption: str, cells: pd.DataFrame, *, num_names: int = 1) -> PageTable:
    """Make a table of text sortable; a number sorts by how its text begins.

    :param caption: What it shows.
    :param cells: The text.
    :param num_names: Columns to the left that hold names.

    :returns: The table.
    """
    rows = [
        TableRow(
            cells=[
                Cell(
                    text=text, value=_leading_number(text) if idx >= num_names else None
                )
                for idx, text in enumerate(texts)
            ]
        )
        for texts in cells.itertuples(index=False)
    ]

    headings = [
        Heading(
            text=str(name),
            is_number=any(row.cells[idx].value is not None for row in rows),
        )
        for idx, name in enumerate(cells.columns)
    ]

    return PageTable(caption=caption, headings=headings, rows=rows)


def _arrow(column: Column) -> str:
    return {True: " ↓", False: " ↑", None: ""}[column.lower_is_better]


def _number_cell(row: Row, column: Column, metric: MetricPairs | None) -> Cell:
    statistic = row.statistics.get(column.key)
    if statistic is None:
        return Cell(text=DASH)

    def write(number: float) -> str:
        return format(number, column.number_format)

    details = []
    if statistic.sd:
        details.append(f"± {write(statistic.sd)}")
    if statistic.low is not None and statistic.high is not None:
        details.append(f"[{write(statistic.low)}, {write(statistic.high)}]")
    if statistic.num_runs < len(row.records):
        details.append(f"{statistic.num_runs} of {len(row.records)} runs")

    mark = ""
    if metric is not None and any(row is best for best in find_ties(metric)):
        mark = LEADER_MARK
    elif metric is not None and any(row is rival for rival in metric.not_beaten):
        mark = RIVAL_MARK

    return Cell(
        text=write(statistic.mean),
        value=number_value(statistic.mean),
        details=details,
        mark=mark,
    )


def _leading_number(text: str) -> str | None:
    found = _NUMBER.match(text)

    return None if found is None else found.group().replace(",", "")
