"""The page of pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moxe_plugin.report.comparison import SuiteResults, compare
from moxe_plugin.report.pair_tables import (
    leader_cells,
    pair_cells,
    pairs_content,
    pairs_frame,
)
from moxe_plugin.report.pairs_page import pairs_latex, pairs_markdown
from tests.report.synthetic import make_trained
from tests.report.synthetic_items import make_scored

GAPS = (0.4, 0.5, 0.6)


def _suite() -> SuiteResults:
    noise = np.random.default_rng(0).normal(5.0, 2.0, size=400)

    (suite,) = compare(
        [
            make_scored(system, seed, noise + factor * gap, loss=4.0 + factor)
            for system, factor in (("moxe", 0.0), ("gemma2", 1.0))
            for seed, gap in enumerate(GAPS, start=1)
        ],
        [],
    )

    return suite


def test_pair_shows_difference_interval_and_adjusted_p() -> None:
    (comparison,) = _suite().comparisons
    metric = next(
        m for m in comparison.pairs if m.column.key == "lambada_perplexity_per_word"
    )

    (cells,) = pair_cells(metric, metric.pairs).to_dict("records")

    # 0.5 ± 4.303 * 0.1 / sqrt(3); t = 8.66 with two degrees of freedom
    assert cells == {
        "first": "Moxe",
        "second": "Gemma2",
        "difference": "-0.500",
        "95 % interval": "[-0.748, -0.252]",
        "ratio": "0.607",
        "p": "0.013",
        "p, Holm": "0.013",
        "first is": "better",
    }


def test_leader_is_named_with_those_it_does_not_beat() -> None:
    (comparison,) = _suite().comparisons
    cells = leader_cells(comparison).set_index("metric")

    assert cells.loc["LAMBADA perplexity per word", "best mean"] == "Moxe"
    assert cells.loc["LAMBADA perplexity per word", "not shown to be worse"] == (
        "none: better than all others"
    )
    # The instruction loss of all runs of a system is the same: certain.
    assert cells.loc["valid loss, nats", "value"] == "4.000"


def test_page_names_the_correction_and_the_basis() -> None:
    page = pairs_markdown(_suite())

    assert "Holm's method" in page
    assert "1 of 1 pairs tested, over items and seeds (400 items)" in page
    assert "over seeds; Holm's method over these." in page


def test_files_hold_unrounded_numbers() -> None:
    suite = _suite()
    line = pairs_frame(suite).set_index("metric").loc["lambada_perplexity_per_word"]

    assert line["difference"] == pytest.approx(-0.5)
    assert (line["basis"], line["num_items"], line["seeds"]) == (
        "items and seeds",
        400,
        "1 2 3",
    )

    (comparison,) = pairs_content(suite)["comparisons"]
    by_metric = {metric["metric"]: metric for metric in comparison["metrics"]}
    (pair,) = by_metric["lambada_perplexity_per_word"]["pairs"]

    assert pair["difference"] == pytest.approx(-0.5)
    assert math.isclose(pair["p_value"], line["p_value"])
    assert pairs_latex(suite).count(r"\begin{table}") == len(comparison["metrics"])


def test_pairs_that_cannot_be_tested_say_why() -> None:
    (suite,) = compare([make_trained("moxe"), make_trained("gemma2", loss=5.0)], [])

    page = pairs_markdown(suite)

    assert "0 of 1 pairs tested" in page
    assert "- Note: All pairs: two seeds in common are needed, there are 1." in page
    assert pairs_frame(suite)["difference"].isna().all()
