"""Sentences say what the statistics say, and no more."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np

from moxe_plugin.report.content import ComparisonReport, Report, build_report
from moxe_plugin.report.pairs import MetricPairs
from moxe_plugin.report_page.ablation_summary import summarize_ablations
from moxe_plugin.report_page.glance import glance_cells
from moxe_plugin.report_page.summary import (
    MetricSummary,
    summarize_costs,
    summarize_headline,
    summarize_metric,
)
from moxe_plugin.report_page.wording import format_difference
from tests.report.synthetic import make_guess
from tests.report.synthetic_items import LAMBADA, make_lambada, make_scored
from tests.report_page.conftest import HOSTILE


def _part(report: Report, suite: str) -> ComparisonReport:
    (part,) = (
        part
        for suite_report in report.suites
        if suite_report.results.suite == suite
        for part in suite_report.comparisons
    )

    return part


def _metric(part: ComparisonReport, key: str) -> MetricPairs:
    (metric,) = (m for m in part.comparison.pairs if m.column.key == key)

    return metric


def _answers(report: Report, suite: str, key: str) -> dict[str, str]:
    part = _part(report, suite)
    summary: MetricSummary = summarize_metric(_metric(part, key), part, report.paper)

    return {question: "\n".join(lines) for question, lines in summary.answers}


def test_only_what_is_shown_is_called_worse(report: Report) -> None:
    answers = _answers(report, "small", "lambada_perplexity_per_word")

    # gemma2 and gamma = 0 are behind by far more than the noise; MoxE is 0.01 behind.
    assert re.match(r"Moxe_gamma0: .*\nGemma2: ", answers["Shown to be worse (2 of 3)"])
    assert re.match(r"Moxe: ", answers["Not decided (1 of 3)"])


def test_differences_have_the_sign_of_the_named_system(report: Report) -> None:
    metric = _metric(_part(report, "small"), "lambada_perplexity_per_word")
    pair = next(p for p in metric.pairs if p.second.system == "gemma2")
    assert pair.first is metric.leader
    assert pair.estimate is not None

    # 9.5 - 4.99 nats a word: a perplexity exp(4.51) = 91 times as high.
    text = format_difference(metric.column, pair, sign=-1)
    factor, low, high = (float(n) for n in re.findall(r"[\d.]+", text)[:3])

    assert math.isclose(factor, math.exp(-pair.estimate.value), rel_tol=0.01)
    assert 80 < low < factor < high < 100


def test_losses_are_compared_in_their_unit(report: Report) -> None:
    answers = _answers(report, "small", "valid_loss_nats")

    assert "Gemma2: +4.510 [" in answers["Shown to be worse (3 of 3)"]
    assert "nats per token, p = " in answers["Shown to be worse (3 of 3)"]


def test_a_guess_that_is_better_is_not_hidden(report: Report) -> None:
    answers = _answers(report, "small", "lambada_perplexity_per_word")

    text = answers["Against the best guess"]
    assert text.startswith("uniform guess (2,981): beaten; ")
    assert text.endswith("Systems not shown to beat it: Gemma2.")


def test_moxe_is_set_against_each_baseline(report: Report) -> None:
    answers = _answers(report, "small", "lambada_perplexity_per_word")

    xlstm, gemma2 = answers["MoxE less each baseline"].splitlines()
    assert xlstm.startswith("Xlstm: not decided; ")
    assert gemma2.startswith("Gemma2: MoxE is better; 0.01")


def test_the_paper_is_quoted_where_it_has_a_number(report: Report) -> None:
    perplexity = _answers(report, "small", "lambada_perplexity_per_word")
    loss = _answers(report, "small", "valid_loss_nats")
    accuracy = _answers(report, "small", "lambada_accuracy")

    assert "65,213.61" in perplexity["In the paper"]
    assert loss["In the paper"].startswith("Figure 3b")
    assert accuracy["In the paper"] == "The paper gives no number for this."


def test_cost_is_that_of_the_leaders_and_of_moxe(report: Report) -> None:
    xlstm, moxe = summarize_costs(_part(report, "small"))

    assert (xlstm[0], moxe[0]) == ("Xlstm", "Moxe")
    assert xlstm[1].startswith("1,900,000 parameters, 800,000 of them active")
    assert "987 tokens/s in training, 1.25 GiB peak memory" in moxe[1]


def test_one_seed_decides_nothing(report: Report) -> None:
    part = _part(report, "quickstart")
    answers = _answers(report, "quickstart", "valid_loss_nats")

    assert (
        "order of the systems may be chance" in summarize_headline(part.comparison)[1]
    )
    assert answers["Not tested (1 of 1)"].startswith(f"{HOSTILE} (4.500): two seeds")
    assert not any(q.startswith(("Shown", "Not decided")) for q in answers)

    glance = glance_cells(part).set_index("metric").loc["valid loss, nats ↓"]
    assert glance["best mean"] == "Xlstm"
    assert glance["next less best"] == glance["shown to be worse"] == "not tested"


def test_headline_counts_leaders(report: Report) -> None:
    first, *others = summarize_headline(_part(report, "small").comparison)

    assert "Xlstm on" in first
    assert any(
        s.startswith("Shown to be better than every other") and "valid loss" in s
        for s in others
    )
    assert any(
        s.startswith("The best mean is not shown") and "LAMBADA perplexity" in s
        for s in others
    )


def test_ablations_are_sorted_by_what_is_shown(report: Report) -> None:
    ablations = summarize_ablations(_part(report, "small"))

    assert ablations is not None
    assert ablations.measure == "LAMBADA perplexity per word"

    findings = dict(ablations.findings)
    (worse,) = findings["Shown to be worse, as the paper says"]
    assert worse.startswith("Moxe_gamma0: here +")
    assert worse.endswith("paper +435.02 %")
    assert len(findings["Not run"]) == 4


def test_ties_and_better_guesses_are_not_hidden() -> None:
    # No word is greedy, and a guess is nearer to all of them.
    records = [
        make_scored(system, 1, np.full(20, nats))
        for system, nats in (("moxe", 5.0), ("xlstm", 6.0))
    ]
    guess = replace(make_guess(), items={LAMBADA: make_lambada(np.full(20, 4.0))})
    part = _part(build_report([*records, guess], []), "quickstart")

    glance = glance_cells(part).set_index("metric")
    assert glance.loc["LAMBADA accuracy ↑", "best mean"] == "2 systems tied"
    assert glance.loc["LAMBADA perplexity per word ↓", "best mean"] == "Moxe"

    sentence = summarize_headline(part.comparison)[1]
    assert sentence.startswith("The best guess")
    assert sentence.endswith("LAMBADA perplexity per word.")
