"""What pages are made of: names, captions, and figures that a person can read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from matplotlib.text import Text

from moxe_plugin.report.content import ComparisonReport, Report, build_report
from moxe_plugin.report.paper import read_paper
from moxe_plugin.report.records import RunRecord
from moxe_plugin.report.styles import DrawnFigure, drawing, svg_text, system_style
from tests.report.synthetic import make_guess, make_trained
from tests.report.synthetic_items import LAMBADA, make_lambada, make_scored
from tests.report.test_paper import RESULTS

SYSTEMS = (
    "moxe",
    "moxe_gamma0",
    "moxe_standard",
    "moxe_no_group_loss",
    "moxe_ffn",
    "moxe_mlstm",
    "moxe_slstm",
    "xlstm",
    "gemma2",
    "qwen_moe",
)


def _route(record: RunRecord) -> RunRecord:
    shares = {
        f"layer_{layer}/{metric}": 0.5 + layer / 10
        for layer in range(3)
        for metric in ("mlstm_share", "busiest_expert_share")
    }
    routing = {"Router Z Loss": 2.0, "Load Balance Loss": 1.1, **shares}

    return replace(record, train=[{**line, **routing} for line in record.train])


@pytest.fixture(scope="module")
def report() -> Report:
    generator = np.random.default_rng(0)
    records = [
        _route(
            make_scored(
                system, seed, generator.normal(5.0 + idx / 9, 1.0, size=50), loss=4.0
            )
        )
        for idx, system in enumerate(SYSTEMS)
        for seed in (1, 2)
    ]

    guess = replace(make_guess(), items={LAMBADA: make_lambada(np.full(50, 20.0))})

    return build_report([*records, guess], [], paper=read_paper(RESULTS / "paper.json"))


def _part(report: Report) -> ComparisonReport:
    (suite,) = report.suites
    (part,) = suite.comparisons

    return part


def test_report_has_the_papers_tables_and_figures(report: Report) -> None:
    part = _part(report)

    assert [table.name for table in part.tables] == [
        "quickstart_table1",
        "quickstart_table2",
    ]
    assert [figure.name for figure in part.figures] == [
        f"quickstart_{name}"
        for name in ("fig3a", "fig3b", "fig3c", "fig3d", "fig4", "fig8", "cost")
    ]


def test_captions_say_data_tokens_seeds_and_size(report: Report) -> None:
    part = _part(report)

    for words in [part.caption, *(figure.caption for figure in part.figures)]:
        assert "Data embedded, 40,960 training tokens, vocabulary 2,048" in words
        assert "seeds 1, 2" in words
        assert "1.9 M parameters" in words
        assert "Not the paper's data (FineWeb-Edu)" in words


def test_second_comparison_has_a_number_in_its_names() -> None:
    records = [make_trained("moxe"), make_trained("moxe", training_tokens=81920)]
    (suite,) = build_report(records, []).suites

    assert [part.name for part in suite.comparisons] == ["quickstart", "quickstart_2"]


def _visible_texts(drawn: DrawnFigure) -> list[Text]:
    """List what is drawn: ticks beyond the ends of an axis are not."""
    hidden = {
        id(label)
        for axes in drawn.figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        if not min(axis.get_view_interval()) - 1e-9
        <= tick.get_loc()
        <= max(axis.get_view_interval()) + 1e-9
        for label in (tick.label1, tick.label2)
    }

    return [
        text
        for text in drawn.figure.findobj(Text)
        if isinstance(text, Text)
        and id(text) not in hidden
        and text.get_visible()
        and text.get_text().strip()
    ]


def _overlaps(texts: Sequence[Text], height: float, width: float) -> list[str]:
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    boxes = [
        (words, box)
        for words, box in boxes
        if box.x1 > 0 and box.y1 > 0 and box.x0 < width and box.y0 < height
    ]

    return [
        f"{words} / {others}"
        for (words, box), (others, other) in combinations(boxes, 2)
        # A pixel of touch is no overlap.
        if min(box.x1, other.x1) - max(box.x0, other.x0) > 1
        and min(box.y1, other.y1) - max(box.y0, other.y0) > 1
    ]


@pytest.mark.parametrize("number", range(7))
def test_no_text_of_a_figure_covers_another_or_is_cut(
    report: Report, number: int
) -> None:
    drawn = _part(report).figures[number]

    with drawing():
        drawn.figure.draw_without_rendering()

    width, height = drawn.figure.bbox.width, drawn.figure.bbox.height
    texts = _visible_texts(drawn)

    assert len(texts) > 5
    assert _overlaps(texts, height, width) == []

    for text in texts:
        box = text.get_window_extent()
        assert box.x0 >= -1, text.get_text()
        assert box.x1 <= width + 1, text.get_text()
        assert box.y0 >= -1, text.get_text()
        assert box.y1 <= height + 1, text.get_text()


def test_systems_of_the_paper_look_different() -> None:
    styles = [system_style(system) for system in SYSTEMS]

    assert len({(style.colour, style.marker) for style in styles}) == len(SYSTEMS)


def test_svg_tells_neither_date_nor_version(report: Report) -> None:
    figure = _part(report).figures[0]

    with drawing():
        text = svg_text(figure)
        assert text == svg_text(figure)

    assert "<dc:date>" not in text
    assert "Matplotlib v" not in text
