"""Writes tables and figures, from run records only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from moxe_plugin.report.architectures import read_architectures
from moxe_plugin.report.cells import suite_content, suite_frame
from moxe_plugin.report.comparison import SuiteResults
from moxe_plugin.report.content import (
    ComparisonReport,
    Report,
    SuiteReport,
    build_report,
)
from moxe_plugin.report.files import DamagedRecordError, write_text
from moxe_plugin.report.formats import (
    latex_table,
    markdown_table,
    write_csv,
    write_rounded_json,
)
from moxe_plugin.report.named_tables import Table
from moxe_plugin.report.pair_tables import pairs_content, pairs_frame
from moxe_plugin.report.pairs_page import pairs_latex, pairs_markdown
from moxe_plugin.report.paper import paper_markdown, read_paper
from moxe_plugin.report.records import DamagedRun, RunRecord
from moxe_plugin.report.styles import drawing, save_figure
from moxe_plugin.report.suite_page import suite_latex, suite_markdown

_LATEX_HEAD: Final = "% Written by `moxe tables`; needs \\usepackage{booktabs}.\n"


def write_tables(
    records: Sequence[RunRecord], damaged: Sequence[DamagedRun], tables_dir: Path
) -> list[SuiteResults]:
    """Write the tables and figures of each suite.

    :param records: The runs.
    :param damaged: Runs to name as excluded.
    :param tables_dir: Where the files go: ``<suite>`` and ``<suite>_pairs`` as
        ``.md``, ``.csv``, ``.tex`` and ``.json``, ``<suite>_table1``, ``_table2`` and
        figures, and ``paper.md`` if ``paper.json`` lies beside the directory.

    :returns: What the tables show.
    """
    tables_dir.mkdir(parents=True, exist_ok=True)

    report = read_report(records, damaged, tables_dir)

    for suite in report.suites:
        _write_suite(suite, tables_dir)

    for table in report.tables:
        write_table(table, tables_dir)

    if report.paper is not None:
        write_text(tables_dir / "paper.md", paper_markdown(report.paper))

    return [suite.results for suite in report.suites]


def read_report(
    records: Sequence[RunRecord], damaged: Sequence[DamagedRun], tables_dir: Path
) -> Report:
    """Build the report with what lies beside the runs.

    :param records: The runs.
    :param damaged: Runs to name as excluded.
    :param tables_dir: The directory of the tables of `moxe systems`; ``paper.json``
        lies beside it.

    :returns: The report; a file that could not be read is excluded like a run.
    """
    architectures, damaged_files = read_architectures(tables_dir)

    paper = None
    paper_file = tables_dir.parent / "paper.json"

    if paper_file.exists():
        try:
            paper = read_paper(paper_file)
        except DamagedRecordError as ex:
            damaged_files.append(DamagedRun(name=paper_file.name, reason=str(ex)))

    return build_report(
        records,
        [*damaged, *damaged_files],
        paper=paper,
        architectures=architectures,
    )


def write_table(table: Table, tables_dir: Path) -> None:
    """Write a table as Markdown, CSV, LaTeX and JSON.

    :param table: The table.
    :param tables_dir: Where the files go.
    """
    parts = [
        f"# {table.title}",
        table.caption,
        markdown_table(table.cells, num_names=table.num_names),
        "\n".join(f"- Note: {note}" for note in table.notes),
    ]
    latex = latex_table(
        table.cells,
        caption=f"{table.title}. {table.caption}",
        label=f"tab:{table.name}",
        num_names=table.num_names,
    )
    content = {
        "title": table.title,
        "caption": table.caption,
        "notes": list(table.notes),
        "rows": table.numbers.astype(object)
        .where(table.numbers.notna(), None)
        .to_dict("records"),
    }

    file = tables_dir / table.name

    write_text(
        file.with_suffix(".md"), "\n\n".join(part for part in parts if part) + "\n"
    )
    write_text(file.with_suffix(".tex"), _LATEX_HEAD + latex)
    write_csv(table.numbers, file.with_suffix(".csv"))
    write_rounded_json(content, file.with_suffix(".json"))


def _write_suite(suite: SuiteReport, tables_dir: Path) -> None:
    results = suite.results

    file = tables_dir / results.suite
    write_text(file.with_suffix(".md"), suite_markdown(results) + _list_figures(suite))
    write_text(file.with_suffix(".tex"), suite_latex(results))
    write_csv(suite_frame(results), file.with_suffix(".csv"))
    write_rounded_json(suite_content(results), file.with_suffix(".json"))

    file = tables_dir / f"{results.suite}_pairs"
    write_text(file.with_suffix(".md"), pairs_markdown(results))
    write_text(file.with_suffix(".tex"), pairs_latex(results))
    write_csv(pairs_frame(results), file.with_suffix(".csv"))
    write_rounded_json(pairs_content(results), file.with_suffix(".json"))

    with drawing():
        for part in suite.comparisons:
            for table in part.tables:
                write_table(table, tables_dir)

            for figure in part.figures:
                save_figure(figure, tables_dir)


def _list_figures(suite: SuiteReport) -> str:
    parts = [part for report in suite.comparisons for part in _figure_parts(report)]

    return (
        ""
        if not parts
        else "\n" + "\n\n".join(["## As the paper shows it", *parts, ""])
    )


def _figure_parts(report: ComparisonReport) -> list[str]:
    links = [f"- [{table.title}]({table.name}.md)" for table in report.tables]
    figures = [f"![{f.title}]({f.name}.png)" for f in report.figures]

    return (["\n".join(links)] if links else []) + figures
