"""The report: one HTML file that needs nothing else."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moxe_plugin.data.overlap_file import Overlap, format_overlap_note
from moxe_plugin.report.cells import format_cell, shown_columns
from moxe_plugin.report.columns import COLUMNS, COLUMNS_BY_KEY
from moxe_plugin.report.content import ComparisonReport, Report
from moxe_plugin.report.paper import paper_cells
from moxe_plugin.report.rows import describe_codes
from moxe_plugin.report.styles import DrawnFigure, drawing, svg_without_words
from moxe_plugin.report_page.ablation_summary import (
    AblationSummary,
    summarize_ablations,
)
from moxe_plugin.report_page.glance import glance_cells
from moxe_plugin.report_page.page_tables import (
    LEADER_MARK,
    RIVAL_MARK,
    PageTable,
    main_table,
    text_table,
)
from moxe_plugin.report_page.pair_table import pair_table
from moxe_plugin.report_page.summary import (
    MetricSummary,
    summarize_costs,
    summarize_headline,
    summarize_metric,
)

_LOSS: Final = "valid_loss_nats"


@dataclass(frozen=True, kw_only=True)
class Section:
    """What the page shows of a comparison."""

    anchor: str
    """An id of ours: the name of a suite may be anything."""

    report: ComparisonReport
    headline: Sequence[str]
    metrics: Sequence[MetricSummary]
    costs: Sequence[tuple[str, str]]
    ablations: AblationSummary | None
    glance: PageTable | None
    table: PageTable
    pairs: PageTable | None
    paper_tables: Sequence[tuple[PageTable, Sequence[str]]]
    """Ours as the paper shows them, each with caption and notes."""

    figures: Sequence[tuple[DrawnFigure, str]]
    """Each with its address."""

    codes: Sequence[Sequence[str]]
    """The code of each row."""

    best: str
    """Who has the lowest held-out loss, and with what."""


def render_page(report: Report, *, overlap: Overlap | None = None) -> str:
    """Render the page.

    Its style and script are the only ones that its Content-Security-Policy allows, and
    it may load nothing. Without its script everything is there, only not sortable.

    :param report: What to show.
    :param overlap: What the training text has of the evaluation texts.

    :returns: HTML.
    """
    environment = Environment(
        loader=PackageLoader("moxe_plugin.report_page", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    folder = files("moxe_plugin.report_page") / "page"
    style = (folder / "page.css").read_text(encoding="utf-8")
    script = (folder / "page.js").read_text(encoding="utf-8")

    with drawing():
        sections = _create_sections(report)

    shown = {
        column.key
        for section in sections
        for column in shown_columns(section.report.comparison)
    }
    tables = [
        (t.title, t.caption, t.cells, t.num_names, t.notes) for t in report.tables
    ]

    return environment.get_template("page.html.jinja").render(
        # Ours, not the runs': these two alone are not escaped.
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        sections=sections,
        paper=report.paper,
        paper_tables=[
            *(
                (text_table(title, cells, num_names=num_names), [caption, *notes])
                for title, caption, cells, num_names, notes in tables
            ),
            *(
                (
                    text_table(f"The paper's {table.title}", paper_cells(table)),
                    [table.note],
                )
                for table in (report.paper.tables if report.paper else ())
            ),
        ],
        overlap_note=None if overlap is None else format_overlap_note(overlap),
        excluded=_list_excluded(report),
        columns=[column for column in COLUMNS if column.key in shown],
        num_runs=len(
            {
                name
                for section in sections
                for row in section.report.comparison.rows
                for name in row.run_names
            }
        ),
        leader_mark=LEADER_MARK,
        rival_mark=RIVAL_MARK,
    )


def _create_sections(report: Report) -> list[Section]:
    parts = [part for suite in report.suites for part in suite.comparisons]

    # The largest training first, then most metrics: that is what a reader came for.
    parts.sort(
        key=lambda part: (
            -(part.comparison.training_tokens or 0),
            -len(part.comparison.pairs),
        )
    )

    return [
        _create_section(f"c{number}", part, report)
        for number, part in enumerate(parts, start=1)
    ]


def _create_section(anchor: str, part: ComparisonReport, report: Report) -> Section:
    comparison = part.comparison

    return Section(
        anchor=anchor,
        report=part,
        headline=summarize_headline(comparison),
        metrics=[
            summarize_metric(metric, part, report.paper) for metric in comparison.pairs
        ],
        costs=summarize_costs(part),
        ablations=summarize_ablations(part),
        glance=(
            text_table("Each metric in a line", glance_cells(part), num_names=2)
            if comparison.pairs
            else None
        ),
        table=main_table(comparison),
        pairs=pair_table(comparison),
        paper_tables=[
            (text_table(t.title, t.cells, num_names=t.num_names), [t.caption, *t.notes])
            for t in part.tables
        ],
        figures=[(figure, _figure_url(figure)) for figure in part.figures],
        codes=[describe_codes(row.records) for row in comparison.rows],
        best=_describe_best(part),
    )


def _describe_best(part: ComparisonReport) -> str:
    for row in part.comparison.trained_rows:
        if _LOSS in row.statistics:
            return f"{row.marked_label}, {format_cell(COLUMNS_BY_KEY[_LOSS], row)}"

    return "—"


def _figure_url(figure: DrawnFigure) -> str:
    # An image of its own: its ids meet no other figure's, its styles need no policy.
    # Line breaks and indents are a seventh of it.
    svg = re.sub(r"\s*\n\s*", " ", svg_without_words(figure)).replace("> <", "><")

    return f"data:image/svg+xml;base64,{b64encode(svg.encode()).decode()}"


def _list_excluded(report: Report) -> list[tuple[str, str]]:
    # A damaged run is named by each suite.
    return sorted(
        {
            (run.name, run.reason)
            for suite in report.suites
            for run in suite.results.excluded
        }
    )


def _hash(content: str) -> str:
    digest = b64encode(hashlib.sha256(content.encode()).digest()).decode()

    return f"sha256-{digest}"
