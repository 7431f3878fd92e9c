"""Intervals over seeds and items, and tests of differences between systems.

An *item* is what a benchmark scores one by one: a document, a passage, a question.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

Array = NDArray[np.float64]

_NUM_RESAMPLES: Final = 2000
_RESAMPLING_SEED: Final = 2
_CONFIDENCE: Final = 0.95


class MissingNumberError(Exception):
    """Raised when what was measured does not give a number; says why."""


class Ratio(NamedTuple):
    """A sum over a sum, by seed and item.

    The value of a seed is ``sum_d numerators / sum_d denominators``, for example nats
    over tokens; that of a system is the mean over seeds.
    """

    numerators: Array
    """*Shape:* ``(num_seeds, num_items)``."""

    denominators: Array
    """*Shape:* as ``numerators``; 0 for an item without the number."""


class Estimate(NamedTuple):
    """A number and how well it is known."""

    value: float
    low: float
    """Lower end of the 95 % interval."""

    high: float
    """Upper end of the 95 % interval."""

    standard_error: float
    degrees_of_freedom: float

    def p_value(self, reference: float) -> float:
        """Test whether the true value is ``reference``, two-sided.

        :param reference: The value to test.

        :returns: The p-value of the t statistic, in [0, 1].
        """
        distance = abs(self.value - reference)

        if self.standard_error == 0.0:
            return 1.0 if distance == 0.0 else 0.0

        score = distance / self.standard_error

        return float(2.0 * student_t.sf(score, self.degrees_of_freedom))


class Resampled(NamedTuple):
    """A ratio, and what it is on resampled items."""

    values: Array
    """The ratio of each seed. *Shape:* ``(num_seeds)``."""

    resamples: Array
    """The same on resampled items. *Shape:* ``(num_resamples, num_seeds)``."""


def draw_weights(num_items: int) -> Array:
    """Draw how often each item is in each of 2000 bootstrap resamples.

    :param num_items: The number of items.

    :returns: Counts; the same ones for the same number of items, so that what is
        resampled by them is paired. *Shape:* ``(num_resamples, num_items)``.
    """
    generator = np.random.default_rng(_RESAMPLING_SEED)

    return generator.multinomial(
        num_items, np.full(num_items, 1 / num_items), size=_NUM_RESAMPLES
    ).astype(np.float64)


def resample_ratio(ratio: Ratio, weights: Array) -> Resampled:
    """Compute a ratio on all items and on resampled ones.

    :param ratio: The ratio.
    :param weights: As :func:`draw_weights` draws them.

    :returns: The values by seed.

    :raises MissingNumberError: Too few items have the number.
    """
    numerators, denominators = ratio

    # (B,D) x (D,S) -> (B,S)
    resampled_denominators = weights @ denominators.T

    if not (resampled_denominators > 0.0).all():
        raise MissingNumberError("too few documents have the number")

    return Resampled(
        numerators.sum(axis=1) / denominators.sum(axis=1),
        (weights @ numerators.T) / resampled_denominators,
    )


def estimate_ratios(terms: Sequence[tuple[float, Ratio]]) -> Estimate:
    """Estimate a weighted sum of ratios over seeds and documents.

    :param terms: Coefficients and ratios, all over the same seeds and documents.

    :returns: As :func:`estimate_resampled`.

    :raises MissingNumberError: There are fewer than two seeds, or too few documents
        have the number.
    """
    num_documents = terms[0][1].numerators.shape[1]
    weights = draw_weights(num_documents)

    return estimate_resampled(
        [(factor, resample_ratio(ratio, weights)) for factor, ratio in terms],
        num_documents,
    )


def estimate_resampled(
    terms: Sequence[tuple[float, Resampled]], num_items: int
) -> Estimate:
    """Estimate a weighted sum of ratios over seeds and items.

    Seeds and items are crossed: each seed is measured on the same items. The squared
    standard error is the sum of two parts. Seeds: the sample variance of the seeds'
    values over their number. Items: the variance of the value over 2000 bootstrap
    resamples of items, the same for all seeds and terms, so that systems are compared
    on equal items and equal seeds. What seed and item do together counts in both parts,
    which errs towards wider intervals. Degrees of freedom are Satterthwaite's.

    Resampling three seeds too (a hierarchical bootstrap) would give intervals that hold
    the truth far less often than they say; Student's t is made for few samples.

    :param terms: Coefficients and ratios, all over the same seeds and resamples.
    :param num_items: The number of items.

    :returns: The estimate.

    :raises MissingNumberError: There are fewer than two seeds.
    """
    num_seeds = len(terms[0][1].values)

    if num_seeds < 2:
        raise MissingNumberError(f"two seeds are needed, there are {num_seeds}")

    by_seed = np.zeros(num_seeds)
    resampled = np.zeros(len(terms[0][1].resamples))

    for coefficient, (values, resamples) in terms:
        by_seed += coefficient * values
        resampled += coefficient * resamples.mean(axis=1)

    return _combine(
        float(by_seed.mean()),
        [
            (float(by_seed.var(ddof=1)) / num_seeds, num_seeds - 1),
            (float(resampled.var(ddof=1)), num_items - 1),
        ],
    )


def interval_over_items(
    resampled: Resampled, scale: Callable[[Array], Array]
) -> tuple[float, float]:
    """Say how far a number would vary on other items of the same kind.

    The models stay as they are: this says nothing about other seeds.

    :param resampled: The ratio.
    :param scale: Turns ratios into the number, for example nats into a perplexity.

    :returns: The 2.5 % and 97.5 % quantiles over resamples of the mean over seeds.
    """
    means = scale(resampled.resamples).mean(axis=1)
    tail = (1.0 - _CONFIDENCE) / 2.0

    low, high = np.quantile(means, [tail, 1.0 - tail])

    return float(low), float(high)


def estimate_samples(samples: Sequence[float]) -> Estimate:
    """Estimate the mean of independent samples with Student's t.

    :param samples: The samples.

    :returns: The estimate.

    :raises MissingNumberError: There are fewer than two samples.
    """
    if len(samples) < 2:
        raise MissingNumberError(f"two samples are needed, there are {len(samples)}")

    values = np.asarray(samples, dtype=np.float64)
    variance = float(values.var(ddof=1)) / len(values)

    return _combine(float(values.mean()), [(variance, len(values) - 1)])


def _combine(value: float, parts: Sequence[tuple[float, int]]) -> Estimate:
    variance = sum(part for part, _ in parts)

    if variance == 0.0:
        return Estimate(value, value, value, 0.0, math.inf)

    degrees = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    error = math.sqrt(variance)
    reach = float(student_t.ppf((1.0 + _CONFIDENCE) / 2.0, degrees)) * error

    return Estimate(value, value - reach, value + reach, error, degrees)


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for being several, by Holm's step-down method.

    The k-th smallest of n is multiplied by ``n - k + 1`` and is at least as large as
    the one before it.

    :param p_values: The p-values.

    :returns: The adjusted ones in the same order, at most 1.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0

    for rank, idx in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[idx]))
        adjusted[idx] = largest

    return adjusted
