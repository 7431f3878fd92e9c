"""What one layer's router did with the tokens of one document, in sums."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moxe_plugin.claims.correlation import rank_correlation
from moxe_plugin.report.statistics import Array

NUM_RARITY_BINS: Final = 10
NUM_BIAS_BINS: Final = 8


class TokenFacts(NamedTuple):
    """What is known of the tokens of a document apart from routing."""

    rarity: Array
    """Minus the log of the unigram probability, in nats. *Shape:* ``(S)``."""

    rarity_bin: NDArray[np.int64]
    """From the most frequent, 0, to the rarest. *Shape:* ``(S)``."""

    own_nll: Array
    """The loss of each token given those before it, in nats. *Shape:* ``(S)``."""

    next_nll: Array
    """The loss of the token after each, in nats. *Shape:* ``(S)``."""


class LayerRouting(NamedTuple):
    """Where a layer sends the tokens of a document, each read as input."""

    difficulty: Array | None
    """*Shape:* ``(S)``."""

    mlstm_share: Array
    """The share of a token's chosen experts that are mLSTM experts. *Shape:*
    ``(S)``."""

    log_odds: Array
    """``ln(P_m / P_s)`` of the biased probabilities. *Shape:* ``(S)``."""

    raw_log_odds: Array
    """The same of the probabilities before the bias. *Shape:* ``(S)``."""


def measure_layer(
    facts: TokenFacts, routing: LayerRouting, bias_scale: float
) -> dict[str, Any]:
    """Measure one layer on one document.

    Rank correlations (``rho_*``, ``None`` where constant) are between the document's
    tokens: of the difficulty with rarity, own loss and next loss, and of the
    probability of the mLSTM group with rarity. ``bin_*`` are sums by bin of rarity.
    ``odds_*`` are sums over tokens about ``y = ln(P_m / P_s)``, ``x = 2 gamma d`` and
    ``r``, the log odds before the bias, of deviations from the document's mean:
    ``odds_xx = sum x x`` and so on; ``raw_log_odds`` is ``sum r`` without. ``curve_*``
    are sums by bin of ``x``, over ``[0, 2 gamma]``, mean not removed.

    :param facts: What is known of the tokens.
    :param routing: Where they went.
    :param bias_scale: Gamma; 0 leaves ``odds_*`` and ``curve_*`` out.

    :returns: Plain values by name; those about difficulty only if there is one.
    """
    group_probs = 1.0 / (1.0 + np.exp(-routing.log_odds))

    measures: dict[str, Any] = {
        "num_tokens": len(facts.rarity),
        "mlstm_share": float(routing.mlstm_share.sum()),
        "mlstm_prob": float(group_probs.sum()),
        "rho_mlstm_prob_rarity": rank_correlation(routing.log_odds, facts.rarity),
        "raw_log_odds": float(routing.raw_log_odds.sum()),
    }

    def sum_by_rarity(values: Array) -> list[float]:
        sums = np.bincount(facts.rarity_bin, weights=values, minlength=NUM_RARITY_BINS)

        return [float(value) for value in sums]

    measures["bin_num_tokens"] = sum_by_rarity(np.ones_like(facts.rarity))
    measures["bin_mlstm_share"] = sum_by_rarity(routing.mlstm_share)
    measures["bin_mlstm_prob"] = sum_by_rarity(group_probs)

    difficulty = routing.difficulty
    if difficulty is None:
        return measures

    measures["difficulty"] = float(difficulty.sum())
    measures["bin_difficulty"] = sum_by_rarity(difficulty)
    measures["rho_difficulty_rarity"] = rank_correlation(difficulty, facts.rarity)
    measures["rho_difficulty_own_nll"] = rank_correlation(difficulty, facts.own_nll)
    measures["rho_difficulty_next_nll"] = rank_correlation(difficulty, facts.next_nll)

    if bias_scale > 0.0:
        bias = 2.0 * bias_scale * difficulty
        measures |= _measure_odds(bias, routing.log_odds, routing.raw_log_odds)
        measures |= _measure_curve(difficulty, bias, routing.log_odds)

    return measures


def _measure_odds(bias: Array, log_odds: Array, raw_log_odds: Array) -> dict[str, Any]:
    x, y, r = (v - v.mean() for v in (bias, log_odds, raw_log_odds))

    return {
        "odds_xx": float(x @ x),
        "odds_xy": float(x @ y),
        "odds_yy": float(y @ y),
        "odds_rr": float(r @ r),
    }


def _measure_curve(difficulty: Array, bias: Array, log_odds: Array) -> dict[str, Any]:
    bins = np.minimum((difficulty * NUM_BIAS_BINS).astype(np.int64), NUM_BIAS_BINS - 1)

    def sum_by_bias(values: Array) -> list[float]:
        return [float(v) for v in np.bincount(bins, values, NUM_BIAS_BINS)]

    return {
        "curve_num_tokens": sum_by_bias(np.ones_like(bias)),
        "curve_x": sum_by_bias(bias),
        "curve_y": sum_by_bias(log_odds),
    }
