"""Rank correlation against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from moxe_plugin.claims.correlation import rank_correlation


def test_rank_correlation_equals_scipys_with_ties() -> None:
    generator = np.random.default_rng(0)
    x = generator.integers(0, 5, size=50).astype(np.float64)
    y = x + generator.integers(0, 5, size=50)

    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)


def test_constant_has_no_rank_correlation() -> None:
    assert rank_correlation(np.ones(5), np.arange(5.0)) is None
