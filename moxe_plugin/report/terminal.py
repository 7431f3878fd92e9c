"""Result tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moxe_plugin.report.cells import comparison_cells, shown_columns
from moxe_plugin.report.comparison import Comparison, SuiteResults
from moxe_plugin.report.records import DamagedRun

_WIDTH: Final = 110


def create_console() -> Console:
    """Create a console for results.

    :returns: The console; where no terminal says how wide it is, wide enough for six
        systems.
    """
    console = Console()

    return console if console.is_terminal else Console(width=_WIDTH)


def print_results(
    results: Sequence[SuiteResults], tables_dir: Path, console: Console
) -> None:
    """Print the tables of all suites and where their files are.

    :param results: The suites.
    :param tables_dir: Where the files are.
    :param console: The terminal.
    """
    for suite in results:
        for comparison in suite.comparisons:
            _print_comparison(suite.suite, comparison, console)

        print_excluded(suite.excluded, console)

        console.print(
            f"Written: {suite.suite}.md, {suite.suite}_pairs.md (also as csv, tex, "
            f"json) and figures in {tables_dir}",
            highlight=False,
        )


def print_excluded(excluded: Sequence[DamagedRun], console: Console) -> None:
    """Print which runs no number comes from.

    :param excluded: The runs.
    :param console: The terminal.
    """
    for run in excluded:
        console.print(f"[yellow]excluded[/] {escape(run.name)}: {escape(run.reason)}")


def _print_comparison(suite: str, comparison: Comparison, console: Console) -> None:
    title = f"{suite}: data {comparison.data.name}"
    if comparison.training_tokens is not None:
        title += f", {comparison.training_tokens:,} training tokens"

    # One column a system: fourteen numbers do not fit beside each other.
    cells = comparison_cells(comparison, shown_columns(comparison))
    cells = cells.set_index("system").T

    table = Table(
        title=title, title_justify="left", box=SIMPLE, padding=0, show_edge=False
    )

    table.add_column(no_wrap=True)
    for label in cells.columns:
        # A narrow terminal must wrap digits, never cut them off.
        table.add_column(label, justify="right", overflow="fold")

    for heading, row in cells.iterrows():
        table.add_row(str(heading), *row)

    console.print(table)

    for note in comparison.notes:
        console.print(f"Note: {note}", highlight=False)
