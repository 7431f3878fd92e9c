"""Intervals and tests against known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from moxe_plugin.report.statistics import (
    Estimate,
    MissingNumberError,
    Ratio,
    Resampled,
    adjust_holm,
    draw_weights,
    estimate_ratios,
    estimate_samples,
    interval_over_items,
    resample_ratio,
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


def test_resamples_are_the_same_ones_every_time() -> None:
    weights = draw_weights(7)

    assert (weights == draw_weights(7)).all()
    assert (weights.sum(axis=1) == 7).all()
    # An item is left out of a resample with probability (6 / 7) ** 7 = 0.340.
    assert (weights == 0).mean() == pytest.approx(0.340, abs=0.015)


def test_resampled_ratio_weighs_numerator_and_denominator_alike() -> None:
    ratio = Ratio(np.array([[1.0, 6.0], [2.0, 5.0]]), np.array([[1.0, 3.0]] * 2))
    weights = np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 2.0]])

    resampled = resample_ratio(ratio, weights)

    assert resampled.values == pytest.approx([7 / 4, 7 / 4])
    assert resampled.resamples == pytest.approx(
        np.array([[1.0, 2.0], [7 / 4, 7 / 4], [2.0, 5 / 3]])
    )


def test_interval_over_items_is_of_the_mean_over_seeds_on_its_own_scale() -> None:
    # Means over the two seeds of the exponentials: 1 ... 101.
    means = np.arange(1.0, 102.0)
    resamples = np.log(np.stack([means - 0.5, means + 0.5], axis=1))

    interval = interval_over_items(Resampled(np.zeros(2), resamples), np.exp)

    # The 2.5 % quantile of 101 equally spaced numbers is 2.5 steps from the first.
    assert interval == pytest.approx((3.5, 98.5))


def test_interval_over_items_leaves_the_seeds_as_they_are() -> None:
    values = np.repeat([[1.0], [9.0]], 20, axis=1)

    resampled = resample_ratio(_means(values), draw_weights(20))

    assert interval_over_items(resampled, np.asarray) == pytest.approx((5.0, 5.0))
