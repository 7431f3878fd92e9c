"""The report as text: complete, escaped, the same whenever it is written."""

from __future__ import annotations

import re
from base64 import b64decode
from html import escape, unescape
from xml.etree import ElementTree

import pytest

from moxe_plugin.data.overlap_file import EvalOverlap, Overlap, SourceFile, TrainText
from moxe_plugin.report.content import Report
from moxe_plugin.report_page.page import render_page
from tests.report_page.conftest import HOSTILE


@pytest.fixture(scope="module")
def html(report: Report) -> str:
    return render_page(report)


def test_page_is_the_same_each_time(report: Report, html: str) -> None:
    assert render_page(report) == html


def test_labels_and_names_are_escaped(html: str) -> None:
    assert HOSTILE not in html
    assert escape(HOSTILE, quote=False)[:20] in html
    assert "<b>run</b>" not in html
    assert "broken_&lt;b&gt;run&lt;/b&gt;" in html

    # Our one script, and no tag that a label brought.
    assert html.count("<script") == 1
    assert html.count("</script>") == 1
    assert {m for m in re.findall(r"<img (\w+)=.", html)} == {"src"}
    assert not re.search(r"<[^>]*\sonerror=", re.sub(r'"[^"]*"', "", html))


def test_nothing_is_loaded_from_elsewhere(html: str) -> None:
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)

    assert sources
    assert all(s.startswith(("data:", "#")) for s in sources)
    assert "default-src 'none'" in html


def test_each_figure_is_an_svg_with_a_description(report: Report, html: str) -> None:
    figures = [
        figure
        for suite in report.suites
        for part in suite.comparisons
        for figure in part.figures
    ]
    images = re.findall(
        r'<img src="data:image/svg\+xml;base64,([^"]*)" alt="(.*?)">', html
    )

    assert len(images) == len(figures) > 0
    assert {unescape(alt) for _, alt in images} == {
        f"{figure.title}. {figure.caption}" for figure in figures
    }

    for content, _ in images:
        assert ElementTree.fromstring(b64decode(content)).tag.endswith("svg")


def test_figures_keep_their_words_for_the_next_page(report: Report) -> None:
    part = report.suites[0].comparisons[0]

    assert all(t.get_visible() for f in part.figures for t in f.figure.texts)


def test_every_run_and_every_excluded_one_is_named(report: Report, html: str) -> None:
    for suite in report.suites:
        for part in suite.comparisons:
            for row in part.comparison.rows:
                assert all(f"<code>{name}</code>" in html for name in row.run_names)

    assert "train.jsonl: a value is NaN." in html
    assert html.count("train.jsonl: a value is NaN.") == 1


def test_the_largest_training_comes_first(html: str) -> None:
    assert re.findall(r"<h2>(small|quickstart)</h2>", html) == ["small", "quickstart"]


def test_overlap_is_reported_where_it_was_measured(report: Report, html: str) -> None:
    overlap = Overlap(
        ngram_size=13,
        train=TrainText(
            files=[SourceFile(file="<i>train", sha256="a" * 64)],
            num_documents=2,
            num_words=100,
        ),
        evals={
            "lambada": EvalOverlap(
                files=[],
                num_items=50,
                num_short_items=10,
                num_overlapping_items=4,
                num_ngrams=500,
                num_overlapping_ngrams=5,
                worst=[],
            )
        },
    )

    page = render_page(report, overlap=overlap)

    assert "lambada 4 of 40 (10.00%)" in page
    assert "&lt;i&gt;train" in page
    assert "Overlap of training" not in html
