"""Tests between systems, by hand and on made-up systems that are known to be equal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from moxe_plugin.report.comparison import compare
from moxe_plugin.report.pairs import MetricPairs
from moxe_plugin.report.records import RunRecord
from moxe_plugin.report.statistics import Array
from tests.report.synthetic import make_guess, make_trained
from tests.report.synthetic_items import LAMBADA, make_lambada, make_scored

WORDS = "lambada_perplexity_per_word"


def _compare(records: Sequence[RunRecord]) -> Mapping[str, MetricPairs]:
    (suite,) = compare(records, [])
    (comparison,) = suite.comparisons

    return {metric.column.key: metric for metric in comparison.pairs}


def _make_systems(nll: Mapping[str, Array]) -> list[RunRecord]:
    """``nll`` by system, seeds by items."""
    return [
        make_scored(system, seed, values, loss=4.0)
        for system, rows in nll.items()
        for seed, values in enumerate(rows, start=1)
    ]


def test_loss_without_items_is_a_paired_t_test_over_seeds() -> None:
    losses = {"moxe": [4.0, 4.1, 4.3], "gemma2": [4.5, 4.5, 4.9]}
    records = [
        make_trained(system, seed, loss)
        for system, values in losses.items()
        for seed, loss in enumerate(values, start=1)
    ]

    (pair,) = _compare(records)["valid_loss_nats"].pairs

    expected = stats.ttest_rel(losses["moxe"], losses["gemma2"])
    interval = expected.confidence_interval(0.95)

    assert pair.estimate is not None
    assert (pair.first.system, pair.second.system) == ("moxe", "gemma2")
    assert (pair.basis, pair.num_items) == ("seeds", None)
    assert pair.estimate.value == pytest.approx(-0.5)
    assert pair.estimate.low == pytest.approx(interval.low)
    assert pair.estimate.high == pytest.approx(interval.high)
    assert pair.p_value == pytest.approx(expected.pvalue)
    # One pair: nothing to adjust.
    assert pair.adjusted_p_value == pytest.approx(expected.pvalue)
    assert pair.verdict == "better"


def test_words_are_paired_by_item_and_seed() -> None:
    generator = np.random.default_rng(0)
    noise = generator.normal(5.0, 2.0, size=(3, 400))
    gaps = np.array([[0.4], [0.5], [0.6]])

    metric = _compare(_make_systems({"moxe": noise, "gemma2": noise + gaps}))[WORDS]
    (pair,) = metric.pairs

    # Items differ by the same gap: only seeds are left.
    expected = stats.ttest_1samp([-0.4, -0.5, -0.6], 0.0)

    assert pair.estimate is not None
    assert (pair.basis, pair.num_items, list(pair.seeds)) == (
        "items and seeds",
        400,
        [1, 2, 3],
    )
    assert pair.estimate.value == pytest.approx(-0.5)
    assert pair.p_value == pytest.approx(expected.pvalue, rel=1e-3)
    assert pair.verdict == "better"
    assert metric.leader.system == "moxe"
    assert metric.not_beaten == []


def test_accuracy_is_better_when_higher() -> None:
    good = np.tile([0.5, 0.5, 0.5, 2.0], (3, 100))
    bad = np.tile([0.5, 2.0, 2.0, 2.0], (3, 100))

    metric = _compare(_make_systems({"gemma2": good, "moxe": bad}))["lambada_accuracy"]
    (pair,) = metric.pairs

    assert pair.estimate is not None
    assert metric.leader.system == "gemma2"
    assert pair.estimate.value == pytest.approx(0.5)
    assert pair.verdict == "better"


def test_holm_adjusts_over_all_pairs_of_a_metric() -> None:
    generator = np.random.default_rng(1)
    nll = {
        name: 5.0 + shift + generator.normal(size=(3, 200))
        for name, shift in (("moxe", 0.0), ("xlstm", 0.1), ("gemma2", 0.5))
    }

    pairs = _compare(_make_systems(nll))[WORDS].pairs

    raw = [pair.p_value for pair in pairs if pair.p_value is not None]
    # What is multiplied by 3, 2 and 1 must not fall below what came before.
    order = np.argsort(raw)
    steps = np.maximum.accumulate(np.array(raw)[order] * [3, 2, 1]).clip(max=1.0)

    assert len(raw) == 3
    assert [pairs[idx].adjusted_p_value for idx in order] == pytest.approx(list(steps))


def test_a_difference_that_holm_takes_back_is_not_decided() -> None:
    # Each difference alone is significant at p = 0.04; three of them are not.
    target = stats.t.isf(0.02, 2)
    spread = np.array([-1.0, 0.0, 1.0])
    mean = target * spread.std(ddof=1) / np.sqrt(3)
    records = [
        make_trained(system, seed, 5.0 + factor * (mean + spread[seed - 1]) / 10)
        for system, factor in (("moxe", 0.0), ("xlstm", 1.0), ("gemma2", 2.0))
        for seed in (1, 2, 3)
    ]

    pairs = _compare(records)["valid_loss_nats"].pairs

    assert [pair.p_value for pair in pairs] == pytest.approx([0.04] * 3)
    assert [pair.adjusted_p_value for pair in pairs] == pytest.approx([0.12] * 3)
    assert {pair.verdict for pair in pairs} == {"not decided"}


def test_unequal_items_refuse_to_pair_and_say_so() -> None:
    nll = np.ones((2, 5)) + np.arange(5)
    records = _make_systems({"moxe": nll, "gemma2": nll + 1.0})
    shifted = [
        replace(record, items={LAMBADA: make_lambada(nll[0] + 1.0, first=2)})
        if record.environment.system == "gemma2"
        else record
        for record in records
    ]

    metric = _compare(shifted)[WORDS]
    (pair,) = metric.pairs

    assert pair.estimate is None
    assert pair.verdict == "not decided"
    (note,) = metric.notes
    assert note == (
        "All pairs: scored on different items (5 and 5, of which 3 in common), "
        "not paired."
    )


def test_items_of_one_side_only_refuse_to_pair() -> None:
    nll = np.ones((2, 5)) + np.arange(5)
    records = [
        replace(record, items={}) if record.environment.system == "gemma2" else record
        for record in _make_systems({"moxe": nll, "gemma2": nll + 1.0})
    ]

    assert _compare(records)[WORDS].notes == ["All pairs: Gemma2 has no items to pair."]


def test_notes_name_the_pairs_that_they_are_about() -> None:
    records = [
        make_trained("moxe", 1, 4.0),
        make_trained("moxe", 2, 4.1),
        make_trained("gemma2", 3, 5.0),
        make_trained("xlstm", 1, 6.0),
    ]

    assert _compare(records)["valid_loss_nats"].notes == [
        "Moxe and Gemma2; Gemma2 and Xlstm: two seeds in common are needed, there are "
        "0.",
        "Moxe and Xlstm: two seeds in common are needed, there are 1.",
    ]


def test_only_common_seeds_enter() -> None:
    records = [
        make_trained("moxe", 1, 4.0),
        make_trained("moxe", 2, 4.2),
        make_trained("moxe", 3, 9.0),
        make_trained("gemma2", 1, 4.5),
        make_trained("gemma2", 2, 4.6),
    ]

    (pair,) = _compare(records)["valid_loss_nats"].pairs

    assert pair.estimate is not None
    assert list(pair.seeds) == [1, 2]
    assert abs(pair.estimate.value) == pytest.approx((0.5 + 0.4) / 2)


def test_one_seed_decides_nothing() -> None:
    records = [make_trained("moxe"), make_trained("gemma2", loss=5.0), make_guess()]

    metric = _compare(records)["valid_loss_nats"]

    assert metric.notes == ["All pairs: two seeds in common are needed, there are 1."]
    assert [pair.verdict for pair in metric.pairs] == ["not decided"]


def test_systems_are_tested_against_the_best_guess_apart_from_each_other() -> None:
    nll = np.full((3, 9), 5.0) + np.arange(9) / 9 + np.array([[0.1], [0.2], [0.3]])
    guesses = [
        replace(make_guess(name), items={LAMBADA: make_lambada(nll[1] + gap)})
        for name, gap in (("uniform", 9.0), ("unigram", 1.0))
    ]
    records = _make_systems({"moxe": nll, "gemma2": nll + 2.0})

    metric = _compare([*records, *guesses])[WORDS]
    moxe, gemma2 = metric.guess_pairs

    expected = stats.ttest_1samp([-1.1, -1.0, -0.9], 0.0)

    assert [p.second.system for p in metric.guess_pairs] == ["unigram"] * 2
    assert [p.first.system for p in metric.guess_pairs] == ["moxe", "gemma2"]
    assert len(metric.pairs) == 1
    assert moxe.p_value == pytest.approx(expected.pvalue, rel=1e-3)
    assert moxe.adjusted_p_value == pytest.approx(2 * expected.pvalue, rel=1e-3)
    assert (moxe.verdict, gemma2.verdict) == ("better", "worse")


def test_equal_systems_are_rarely_told_apart() -> None:
    generator = np.random.default_rng(0)
    num_trials, num_decided, num_held = 60, 0, 0

    for _ in range(num_trials):
        items = generator.normal(5.0, 1.0, size=40)
        # True difference 0: seeds and items vary in both, the items alike.
        nll = {
            name: items
            + generator.normal(scale=0.1, size=(3, 1))
            + generator.normal(scale=0.5, size=(3, 40))
            for name in ("moxe", "gemma2")
        }
        (pair,) = _compare(_make_systems(nll))[WORDS].pairs
        assert pair.estimate is not None

        num_decided += pair.verdict != "not decided"
        num_held += pair.estimate.low <= 0.0 <= pair.estimate.high

    # 5 % of 60 trials are 3; more than 8 have a probability below 1 %.
    assert num_decided <= 8
    assert num_held >= num_trials - 8


def test_ten_systems_on_all_of_lambada_take_seconds() -> None:
    generator = np.random.default_rng(0)
    nll = {
        f"system{idx}": generator.normal(5.0, 1.0, size=(3, 5153)) for idx in range(10)
    }
    records = _make_systems(nll)

    start = time.process_time()
    metrics = _compare(records)

    assert len(metrics[WORDS].pairs) == 45
    assert all(pair.estimate is not None for pair in metrics[WORDS].pairs)
    assert time.process_time() - start < 30.0
