"""Intervals, tests and correlations against known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from moxe_plugin.claims.statistics import (
    Estimate,
    MissingNumberError,
    Ratio,
    adjust_holm,
    estimate_ratios,
    estimate_samples,
    rank_correlation,
)


def _means(values: np.ndarray) -> Ratio:
    return Ratio(values, np.ones_like(values))


def test_value_is_the_mean_over_seeds_of_ratios_of_sums() -> None:
    numerators = np.array([[1.0, 5.0], [2.0, 10.0]])
    denominators = np.array([[1.0, 2.0], [1.0, 3.0]])

    estimate = estimate_ratios([(1.0, Ratio(numerators, denominators))])

    assert estimate.value == pytest.approx((6 / 3 + 12 / 4) / 2)


def test_seeds_part_is_students_t() -> None:
    # Equal documents leave nothing to resample.
    values = np.repeat([[1.0], [2.0], [4.0]], 5, axis=1)

    estimate = estimate_ratios([(1.0, _means(values))])

    expected = stats.ttest_1samp([1.0, 2.0, 4.0], 0.5)
    interval = expected.confidence_interval(0.95)

    assert estimate.low == pytest.approx(interval.low)
    assert estimate.high == pytest.approx(interval.high)
    assert estimate.p_value(0.5) == pytest.approx(expected.pvalue)
    assert estimate.degrees_of_freedom == pytest.approx(2)


def test_documents_part_is_the_standard_error_of_their_mean() -> None:
    values = np.random.default_rng(0).normal(size=100)

    estimate = estimate_ratios([(1.0, _means(np.stack([values] * 3)))])

    # The bootstrap's variance has n, not n - 1, below the line.
    expected = values.std() / math.sqrt(100)

    assert estimate.standard_error == pytest.approx(expected, rel=0.05)
    assert estimate.degrees_of_freedom == pytest.approx(99)


def test_differences_are_paired_by_seed_and_document() -> None:
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(3, 20), scale=10.0)

    estimate = estimate_ratios([(1.0, _means(noise + 0.5)), (-1.0, _means(noise))])

    assert estimate.value == pytest.approx(0.5)
    assert estimate.standard_error < 1e-12


@pytest.mark.parametrize(
    ("seed_sd", "document_sd", "rest_sd"),
    [(1.0, 0.1, 0.1), (0.05, 1.0, 0.1), (0.3, 1.0, 1.0)],
    ids=["seeds", "documents", "all"],
)
def test_intervals_hold_the_truth_as_often_as_they_say(
    seed_sd: float, document_sd: float, rest_sd: float
) -> None:
    generator = np.random.default_rng(0)
    num_trials, num_held = 300, 0

    for _ in range(num_trials):
        values = (
            generator.normal(scale=seed_sd, size=(3, 1))
            + generator.normal(scale=document_sd, size=(1, 30))
            + generator.normal(scale=rest_sd, size=(3, 30))
        )
        estimate = estimate_ratios([(1.0, _means(values))])
        num_held += estimate.low <= 0.0 <= estimate.high

    # 95 % less three standard errors of 300 trials; a percentile bootstrap over three
    # seeds holds the truth in about 75 %.
    assert num_held / num_trials > 0.91


def test_one_seed_gives_no_interval() -> None:
    with pytest.raises(MissingNumberError, match="two seeds are needed, there are 1"):
        estimate_ratios([(1.0, _means(np.ones((1, 5))))])


def test_a_number_of_one_document_gives_no_interval() -> None:
    numbers = np.zeros((2, 5))
    numbers[:, 0] = 1.0

    with pytest.raises(MissingNumberError, match="too few documents"):
        estimate_ratios([(1.0, Ratio(numbers, numbers))])


def test_samples_are_estimated_with_students_t() -> None:
    samples = [1.0, 1.2, 0.9, 1.05]

    estimate = estimate_samples(samples)

    interval = stats.ttest_1samp(samples, 0.0).confidence_interval(0.95)
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))


def test_a_number_without_scatter_is_certain() -> None:
    estimate = estimate_samples([2.0, 2.0])

    assert estimate == Estimate(2.0, 2.0, 2.0, 0.0, math.inf)
    assert estimate.p_value(2.0) == 1.0
    assert estimate.p_value(1.0) == 0.0


def test_holm_steps_down() -> None:
    # 0.01 * 4; 0.02 * 3; 0.03 * 2 is less than what came before; 0.4 * 1
    adjusted = adjust_holm([0.03, 0.01, 0.4, 0.02])

    assert adjusted == pytest.approx([0.06, 0.04, 0.4, 0.06])


def test_holm_stays_a_probability() -> None:
    assert adjust_holm([0.6, 0.9]) == [1.0, 1.0]


def test_rank_correlation_equals_scipys_with_ties() -> None:
    generator = np.random.default_rng(0)
    x = generator.integers(0, 5, size=50).astype(np.float64)
    y = x + generator.integers(0, 5, size=50)

    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_constant_has_no_rank_correlation() -> None:
    assert rank_correlation(np.ones(5), np.arange(5.0)) is None
