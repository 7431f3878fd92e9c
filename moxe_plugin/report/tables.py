"""Result tables as Markdown and CSV, from run records only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pandas as pd

from moxe_plugin.report.comparison import (
    Comparison,
    Row,
    Statistic,
    SuiteResults,
    compare,
)
from moxe_plugin.report.measurements import COLUMNS, Column
from moxe_plugin.report.paper import write_paper_table
from moxe_plugin.report.plots import plot_suite
from moxe_plugin.report.records import DamagedRun, RunRecord

DASH: Final = "—"
"""What stands for a number that does not exist."""

_PREAMBLE: Final = """\
Written by `moxe tables` from the run directories named below each table; no number is
typed by hand. A dash is a number that does not exist. `±` is the sample standard
deviation over seeds. Small models and little text: nothing here compares with the
paper's numbers."""


def write_tables(
    records: Sequence[RunRecord], damaged: Sequence[DamagedRun], tables_dir: Path
) -> list[SuiteResults]:
    """Write the table, the CSV file and the plot of each suite.

    :param records: The runs.
    :param damaged: Runs to name as excluded.
    :param tables_dir: Where the files go: ``<suite>.md``, ``.csv`` and ``.png``, and
        ``paper.md`` if ``paper.json`` lies beside the directory.

    :returns: What the tables show.
    """
    results = compare(records, damaged)

    tables_dir.mkdir(parents=True, exist_ok=True)

    for suite in results:
        file = tables_dir / suite.suite

        file.with_suffix(".md").write_text(suite_markdown(suite), encoding="utf-8")

        suite_frame(suite).to_csv(
            file.with_suffix(".csv"), index=False, lineterminator="\n"
        )

        plot_suite(suite, file.with_suffix(".png"))

    paper_file = tables_dir.parent / "paper.json"
    if paper_file.exists():
        write_paper_table(paper_file, tables_dir / "paper.md")

    return results


def suite_markdown(results: SuiteResults) -> str:
    """Write the page of a suite.

    :param results: The suite.

    :returns: Markdown.
    """
    parts = [f"# {results.suite}", _PREAMBLE]

    for comparison in results.comparisons:
        parts += _comparison_parts(comparison)

    if len(results.comparisons) > 1:
        parts.insert(2, "**The tables below do not compare with each other.**")

    if results.excluded:
        lines = [f"- `{run.name}`: {run.reason}" for run in results.excluded]
        parts += ["## Excluded runs", "\n".join(lines)]

    if results.comparisons:
        lines = [f"- **{column.heading}**: {column.meaning}." for column in COLUMNS]
        parts += ["## Columns", "\n".join(lines)]

    return "\n\n".join(parts) + "\n"


def comparison_cells(comparison: Comparison) -> pd.DataFrame:
    """Format the rows of a comparison.

    :param comparison: The rows.

    :returns: Text cells; one column for each heading.
    """
    rows = []

    for row in comparison.rows:
        seeds = [r.environment.seed for r in row.records if not row.is_guess]

        cells = {"system": row.label, "seeds": ", ".join(map(str, seeds)) or DASH}
        for column in COLUMNS:
            cells[column.heading] = format_cell(column, row)

        rows.append(cells)

    frame: pd.DataFrame = pd.DataFrame(rows, dtype="object")

    return frame


def format_cell(column: Column, row: Row) -> str:
    """Format one number of a row.

    :param column: The column.
    :param row: The row.

    :returns: For example ``4.213 ± 0.011``; ``(2 of 3)`` follows if runs lack the
        number, and a dash stands for none.
    """
    statistic = row.statistics.get(column.key)
    if statistic is None:
        return DASH

    text = format(statistic.mean, column.number_format)

    # Counts that are equal by design would only clutter the table with zeros.
    if statistic.sd:
        text += f" ± {format(statistic.sd, column.number_format)}"

    if statistic.num_runs < len(row.records):
        text += f" ({statistic.num_runs} of {len(row.records)})"

    return text


def suite_frame(results: SuiteResults) -> pd.DataFrame:
    """List all rows of a suite with unrounded numbers.

    :param results: The suite.

    :returns: One line a row: mean, standard deviation and number of runs by column;
        ``comparison`` numbers the tables, which do not compare with each other.
    """
    lines = []

    for number, comparison in enumerate(results.comparisons, start=1):
        for row in comparison.rows:
            line: dict[str, object] = {
                "comparison": number,
                "system": row.system,
                "label": row.label,
                "num_runs": len(row.records),
            }

            for column in COLUMNS:
                mean, sd, num_runs = row.statistics.get(
                    column.key, Statistic(float("nan"), None, 0)
                )
                line[column.key] = mean
                line[f"{column.key}_sd"] = sd
                line[f"{column.key}_runs"] = num_runs

            lines.append({**line, "runs": " ".join(row.run_names)})

    frame: pd.DataFrame = pd.DataFrame(lines)

    return frame


def _comparison_parts(comparison: Comparison) -> list[str]:
    data = comparison.data

    tokens = comparison.training_tokens
    title = f"## Data `{data.name}`"
    if tokens is not None:
        title += f", {tokens:,} training tokens"

    facts = (
        f"Vocabulary {data.vocab_size:,} (tokenizer `{data.tokenizer_sha256[:12]}`), "
        f"training text `{data.train_sha256[:12]}`, "
        f"held-out text `{data.valid_sha256[:12]}`."
    )

    cells = comparison_cells(comparison)
    # Numbers to the right, names to the left.
    table = cells.to_markdown(
        index=False,
        disable_numparse=True,
        colalign=["left", *["right"] * (cells.shape[1] - 1)],
    )

    parts = [title, facts, table]

    if comparison.notes:
        parts.append("\n".join(f"- Note: {note}" for note in comparison.notes))

    runs = [
        f"- {row.label}: " + ", ".join(f"`{name}`" for name in row.run_names)
        for row in comparison.rows
    ]

    return [*parts, "Runs:", "\n".join(runs)]
