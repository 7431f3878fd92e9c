"""Rank correlation."""

from __future__ import annotations

import math

from scipy.stats import rankdata

from moxe_plugin.report.statistics import Array


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
