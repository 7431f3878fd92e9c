"""Everything that tables and figures show, computed once from run records.

``build_report(records, damaged, ...)`` is what a page is made of: it reads no file and
writes none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from moxe_plugin.report.ablations import ablation_table
from moxe_plugin.report.architecture_tables import (
    architecture_table,
    suite_architecture_table,
)
from moxe_plugin.report.architectures import Architecture
from moxe_plugin.report.comparison import Comparison, SuiteResults, compare
from moxe_plugin.report.cost_figure import draw_cost_figure
from moxe_plugin.report.named_tables import Table
from moxe_plugin.report.paper import Paper
from moxe_plugin.report.perplexity_figure import draw_perplexity_figure
from moxe_plugin.report.records import DamagedRun, RunRecord
from moxe_plugin.report.styles import DrawnFigure, drawing
from moxe_plugin.report.suite_page import describe_setting
from moxe_plugin.report.training_figures import (
    draw_share_figure,
    draw_training_figures,
)

_SCALE_NOTE: Final = "Not the paper's data (FineWeb-Edu)"


@dataclass(frozen=True, kw_only=True)
class ComparisonReport:
    """What is shown of runs that compare with each other."""

    name: str
    """What the names of its files begin with: that of the suite, and a number from the
    second comparison on."""

    caption: str
    """Data, tokens, seeds and size, as captions say them."""

    comparison: Comparison
    """Rows, their numbers, notes, and the pairs that were tested."""

    tables: Sequence[Table]
    """Tables 1 and 2 as the paper shows them, as far as there are numbers."""

    figures: Sequence[DrawnFigure]
    """Figures 3a to 3d, 4 and 8 as the paper shows them, and cost."""


@dataclass(frozen=True, kw_only=True)
class SuiteReport:
    """What is shown of a suite."""

    results: SuiteResults
    """Its comparisons, and the runs that no number comes from."""

    comparisons: Sequence[ComparisonReport]
    """The same comparisons, with tables and figures."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that is shown."""

    suites: Sequence[SuiteReport]
    paper: Paper | None
    """What the paper reports."""

    tables: Sequence[Table]
    """Tables that are of no suite: Table 1 at the paper's size."""


def build_report(
    records: Sequence[RunRecord],
    damaged: Sequence[DamagedRun],
    *,
    paper: Paper | None = None,
    architectures: Sequence[Architecture] = (),
) -> Report:
    """Compute everything that tables and figures show.

    :param records: The runs.
    :param damaged: Runs, and other files, that could not be read.
    :param paper: The paper's numbers, from
        :func:`~moxe_plugin.report.paper.read_paper`.
    :param architectures: From
        :func:`~moxe_plugin.report.architectures.read_architectures`.

    :returns: The report.
    """
    table = architecture_table(architectures, paper)

    with drawing():
        suites = [
            SuiteReport(
                results=results,
                comparisons=[
                    _report_comparison(results, number, paper, architectures)
                    for number in range(len(results.comparisons))
                ],
            )
            for results in compare(records, damaged)
        ]

    return Report(
        suites=suites,
        paper=paper,
        tables=[] if table is None else [table],
    )


def _report_comparison(
    results: SuiteResults,
    number: int,
    paper: Paper | None,
    architectures: Sequence[Architecture],
) -> ComparisonReport:
    comparison = results.comparisons[number]

    # The first keeps its name when another one joins it.
    name = results.suite + (f"_{number + 1}" if number else "")
    caption = describe_caption(results.suite, comparison)

    tables = [
        suite_architecture_table(f"{name}_table1", caption, comparison, architectures)
        if comparison.trained_rows
        else None,
        ablation_table(f"{name}_table2", caption, comparison, paper),
    ]
    figures = [
        *draw_training_figures(name, caption, comparison),
        draw_perplexity_figure(name, caption, comparison, paper),
        draw_share_figure(name, caption, comparison),
        draw_cost_figure(name, caption, comparison, architectures),
    ]

    return ComparisonReport(
        name=name,
        caption=caption,
        comparison=comparison,
        tables=[table for table in tables if table is not None],
        figures=[figure for figure in figures if figure is not None],
    )


def describe_caption(suite: str, comparison: Comparison) -> str:
    """Say what the numbers of a comparison are of.

    :param suite: The suite.
    :param comparison: The comparison.

    :returns: Sentences: suite, data, tokens, vocabulary, seeds, size.
    """
    counts = sorted(
        row.statistics["parameters"].mean
        for row in comparison.trained_rows
        if "parameters" in row.statistics
    )

    text = f"Suite {suite}. {describe_setting(comparison)}"
    if counts:
        low, high = (f"{count / 1e6:,.1f}" for count in (counts[0], counts[-1]))
        size = low if low == high else f"{low} to {high}"
        text += f" {size} M parameters."

    if "fineweb" not in comparison.data.name:
        text += f" {_SCALE_NOTE}."

    return text
