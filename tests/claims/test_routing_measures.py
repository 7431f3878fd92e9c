"""What one layer did with one document, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from moxe_plugin.claims.routing_measures import (
    NUM_RARITY_BINS,
    LayerRouting,
    TokenFacts,
    measure_layer,
)

_GAMMA = 0.3


def _facts(num_tokens: int, generator: np.random.Generator) -> TokenFacts:
    return TokenFacts(
        generator.uniform(1, 9, num_tokens),
        generator.integers(0, NUM_RARITY_BINS, num_tokens),
        own_nll=generator.uniform(1, 9, num_tokens),
        next_nll=generator.uniform(1, 9, num_tokens),
    )


def _routing(num_tokens: int, generator: np.random.Generator) -> LayerRouting:
    difficulty = generator.uniform(0, 1, num_tokens)
    raw = generator.normal(size=num_tokens)

    return LayerRouting(
        difficulty,
        generator.choice([0.0, 0.5, 1.0], num_tokens),
        raw + 2 * _GAMMA * difficulty,
        raw,
    )


def test_sums_by_bin_add_up_to_those_of_all_tokens() -> None:
    generator = np.random.default_rng(0)
    facts, routing = _facts(50, generator), _routing(50, generator)

    measures = measure_layer(facts, routing, _GAMMA)

    assert sum(measures["bin_num_tokens"]) == measures["num_tokens"] == 50
    for name in ("mlstm_share", "mlstm_prob", "difficulty"):
        assert sum(measures[f"bin_{name}"]) == pytest.approx(measures[name])

    third = facts.rarity_bin == 3
    assert measures["bin_num_tokens"][3] == third.sum()
    assert measures["bin_mlstm_share"][3] == routing.mlstm_share[third].sum()


def test_group_probability_is_that_of_the_log_odds() -> None:
    generator = np.random.default_rng(0)
    routing = _routing(2, generator)._replace(log_odds=np.log([3.0, 1.0]))

    measures = measure_layer(_facts(2, generator), routing, _GAMMA)

    assert measures["mlstm_prob"] == pytest.approx(0.75 + 0.5)


def test_odds_are_regressed_within_the_document() -> None:
    generator = np.random.default_rng(0)
    routing = _routing(60, generator)
    assert routing.difficulty is not None

    measures = measure_layer(_facts(60, generator), routing, _GAMMA)

    fit = stats.linregress(2 * _GAMMA * routing.difficulty, routing.log_odds)
    slope = measures["odds_xy"] / measures["odds_xx"]
    assert slope == pytest.approx(fit.slope)

    explained = 1 - routing.raw_log_odds.var() / routing.log_odds.var()
    assert 1 - measures["odds_rr"] / measures["odds_yy"] == pytest.approx(explained)


def test_balanced_raw_odds_are_explained_fully() -> None:
    generator = np.random.default_rng(0)
    routing = _routing(60, generator)
    assert routing.difficulty is not None
    routing = routing._replace(
        raw_log_odds=np.full(60, 0.7), log_odds=0.7 + 2 * _GAMMA * routing.difficulty
    )

    measures = measure_layer(_facts(60, generator), routing, _GAMMA)

    assert measures["odds_xy"] / measures["odds_xx"] == pytest.approx(1.0)
    assert measures["odds_rr"] == pytest.approx(0.0, abs=1e-20)


def test_correlations_are_spearmans() -> None:
    generator = np.random.default_rng(0)
    facts, routing = _facts(60, generator), _routing(60, generator)

    measures = measure_layer(facts, routing, _GAMMA)

    for name in ("rarity", "own_nll", "next_nll"):
        expected = stats.spearmanr(routing.difficulty, getattr(facts, name)).statistic
        assert measures[f"rho_difficulty_{name}"] == pytest.approx(expected)


def test_a_router_without_difficulty_has_no_measure_of_it() -> None:
    generator = np.random.default_rng(0)
    routing = _routing(10, generator)._replace(difficulty=None)

    measures = measure_layer(_facts(10, generator), routing, 0.0)

    assert not [name for name in measures if "difficulty" in name or "odds_" in name]
