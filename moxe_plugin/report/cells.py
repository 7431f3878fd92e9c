"""The rows of a comparison as text cells, and as unrounded numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from moxe_plugin.report.columns import COLUMNS
from moxe_plugin.report.comparison import Comparison, SuiteResults
from moxe_plugin.report.formats import DASH
from moxe_plugin.report.measurements import Column
from moxe_plugin.report.rows import Row, Statistic


def shown_columns(comparison: Comparison) -> list[Column]:
    """List the columns that have a number in a comparison.

    :param comparison: The rows.

    :returns: The columns in order.
    """
    return [
        column
        for column in COLUMNS
        if any(column.key in row.statistics for row in comparison.rows)
    ]


def comparison_cells(
    comparison: Comparison,
    columns: Sequence[Column] = COLUMNS,
    *,
    with_intervals: bool = False,
) -> pd.DataFrame:
    """Format the rows of a comparison.

    :param comparison: The rows.
    :param columns: Which columns to show.
    :param with_intervals: Whether intervals over items follow the numbers.

    :returns: Text cells; one column for each heading.
    """
    rows = []

    for row in comparison.rows:
        cells = {
            "system": row.marked_label,
            "seeds": ", ".join(map(str, row.seeds)) or DASH,
        }
        for column in columns:
            cells[column.heading] = format_cell(
                column, row, with_interval=with_intervals
            )

        rows.append(cells)

    frame: pd.DataFrame = pd.DataFrame(rows, dtype="object")

    return frame


def format_cell(column: Column, row: Row, *, with_interval: bool = False) -> str:
    """Format one number of a row.

    :param column: The column.
    :param row: The row.
    :param with_interval: Whether the interval over items follows.

    :returns: For example ``4.213 ± 0.011 [4.180, 4.245]``; ``(2 of 3)`` follows if runs
        lack the number, and a dash stands for none.
    """
    statistic = row.statistics.get(column.key)
    if statistic is None:
        return DASH

    def write(number: float) -> str:
        return format(number, column.number_format)

    text = write(statistic.mean)

    # Counts that are equal by design would only clutter the table with zeros.
    if statistic.sd:
        text += f" ± {write(statistic.sd)}"

    if with_interval and statistic.low is not None and statistic.high is not None:
        text += f" [{write(statistic.low)}, {write(statistic.high)}]"

    if statistic.num_runs < len(row.records):
        text += f" ({statistic.num_runs} of {len(row.records)})"

    return text


def suite_frame(results: SuiteResults) -> pd.DataFrame:
    """List all rows of a suite with unrounded numbers.

    :param results: The suite.

    :returns: One line a row: mean, standard deviation, number of runs and interval by
        column; ``comparison`` numbers the tables, which do not compare with each other.
    """
    lines = []

    for number, comparison in enumerate(results.comparisons, start=1):
        for row in comparison.rows:
            line: dict[str, object] = {
                "comparison": number,
                "system": row.system,
                "label": row.label,
                "marks": "; ".join(row.marks),
                "seeds": " ".join(map(str, row.seeds)),
                "num_runs": len(row.records),
            }

            for column in COLUMNS:
                statistic = row.statistics.get(
                    column.key, Statistic(float("nan"), None, 0)
                )
                line[column.key] = statistic.mean
                line[f"{column.key}_sd"] = statistic.sd
                line[f"{column.key}_runs"] = statistic.num_runs
                if column.score is not None:
                    line[f"{column.key}_low"] = statistic.low
                    line[f"{column.key}_high"] = statistic.high
                    line[f"{column.key}_items"] = statistic.num_items

            lines.append({**line, "runs": " ".join(row.run_names)})

    # A number of items is whole also where some rows have none.
    types = {f"{c.key}_items": "Int64" for c in COLUMNS if c.score is not None}
    frame: pd.DataFrame = pd.DataFrame(lines).astype(types)

    return frame


def suite_content(results: SuiteResults) -> dict[str, Any]:
    """List everything that the tables of a suite show, as plain values.

    :param results: The suite.

    :returns: The content of its JSON file.
    """
    return {
        "suite": results.suite,
        "comparisons": [_comparison_content(c) for c in results.comparisons],
        "excluded": [run.__dict__ for run in results.excluded],
        "columns": [
            {
                "key": column.key,
                "heading": column.heading,
                "group": column.group,
                "meaning": column.meaning,
                "lower_is_better": column.lower_is_better,
            }
            for column in COLUMNS
        ],
    }


def _comparison_content(comparison: Comparison) -> dict[str, Any]:
    return {
        "data": dict(comparison.data.__dict__),
        "training_tokens": comparison.training_tokens,
        "notes": list(comparison.notes),
        "rows": [
            {
                "system": row.system,
                "label": row.label,
                "is_guess": row.is_guess,
                "marks": list(row.marks),
                "seeds": row.seeds,
                "runs": row.run_names,
                "numbers": {
                    key: statistic._asdict()
                    for key, statistic in row.statistics.items()
                },
            }
            for row in comparison.rows
        ],
    }
