"""Intervals over seeds and documents, tests, and rank correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from scipy.stats import t as student_t

Array = NDArray[np.float64]

_NUM_RESAMPLES: Final = 2000
_RESAMPLING_SEED: Final = 2
_CONFIDENCE: Final = 0.95


class MissingNumberError(Exception):
    """Raised when what was measured does not give a number; says why."""


class Ratio(NamedTuple):
    """A mean over the items of all documents, by seed and document.

    The value of a seed is ``sum_d numerators / sum_d denominators``, for example nats
    over tokens; that of a system is the mean over seeds.
    """

    numerators: Array
    """*Shape:* ``(num_seeds, num_documents)``."""

    denominators: Array
    """*Shape:* as ``numerators``; 0 for a document without the number."""


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


def estimate_ratios(terms: Sequence[tuple[float, Ratio]]) -> Estimate:
    """Estimate a weighted sum of ratios over seeds and documents.

    Seeds and documents are crossed: each seed is measured on the same documents. The
    squared standard error is the sum of two parts. Seeds: the sample variance of the
    seeds' values over their number. Documents: the variance of the value over 2000
    bootstrap resamples of documents, the same for all seeds and terms, so that systems
    are compared on equal documents and equal seeds. What seed and document do together
    counts in both parts, which errs towards wider intervals. Degrees of freedom are
    Satterthwaite's.

    Resampling three seeds too (a hierarchical bootstrap) would give intervals that hold
    the truth far less often than they say; Student's t is made for few samples.

    :param terms: Coefficients and ratios, all over the same seeds and documents.

    :returns: The estimate.

    :raises MissingNumberError: There are fewer than two seeds, or too few documents
        have the number.
    """
    num_seeds, num_documents = terms[0][1].numerators.shape

    if num_seeds < 2:
        raise MissingNumberError(f"two seeds are needed, there are {num_seeds}")

    generator = np.random.default_rng(_RESAMPLING_SEED)
    weights = generator.multinomial(
        num_documents, np.full(num_documents, 1 / num_documents), size=_NUM_RESAMPLES
    ).astype(np.float64)

    by_seed = np.zeros(num_seeds)
    resampled = np.zeros(_NUM_RESAMPLES)

    for coefficient, (numerators, denominators) in terms:
        # (B,D) x (D,S) -> (B,S)
        resampled_denominators = weights @ denominators.T

        if not (resampled_denominators > 0.0).all():
            raise MissingNumberError("too few documents have the number")

        ratios = (weights @ numerators.T) / resampled_denominators
        resampled += coefficient * ratios.mean(axis=1)

        by_seed += coefficient * numerators.sum(axis=1) / denominators.sum(axis=1)

    return _combine(
        float(by_seed.mean()),
        [
            (float(by_seed.var(ddof=1)) / num_seeds, num_seeds - 1),
            (float(resampled.var(ddof=1)), num_documents - 1),
        ],
    )


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


def rank_correlation(x: Array, y: Array) -> float | None:
    """Compute Spearman's correlation; equal values share their mean rank.

    :param x: Values. *Shape:* ``(S)``.
    :param y: Values of the same items. *Shape:* ``(S)``.

    :returns: A number in [-1, 1]; ``None`` if ``x`` or ``y`` is constant.
    """
    ranks = [rankdata(values) - (len(values) + 1) / 2 for values in (x, y)]
    norms = [math.sqrt(float(r @ r)) for r in ranks]

    if 0.0 in norms:
        return None

    return float(ranks[0] @ ranks[1]) / (norms[0] * norms[1])
