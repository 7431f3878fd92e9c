"""Claims about routing: which tokens are found difficult, and where they go."""

from __future__ import annotations

from functools import partial
from typing import Final

from moxe_plugin.claims.evidence import Evidence, Term
from moxe_plugin.claims.judging import Claim, Question
from moxe_plugin.claims.metrics import Metric, correlation, explained_odds, layer_ratio
from moxe_plugin.claims.routing_measures import NUM_RARITY_BINS

COLLAPSE_SHARE: Final = 0.9
"""A router has collapsed onto a group that gets more than this share of the places."""

SLOPE_MARGIN: Final = 0.25
"""How far the slope of the log odds on the bias may be from 1."""

EXPLAINED_SHARE: Final = 0.5
"""The share of the log odds' variance that the bias must explain."""


def list_routing_claims(evidence: Evidence) -> list[Claim]:
    """List the claims about routing.

    :param evidence: The measured runs.

    :returns: The paper's (d) and (e), its equations (23)-(43), and what its word
        "difficulty" implies.
    """
    return [
        make(evidence) for make in (_rare_tokens, _collapse, _odds, _loss_of_tokens)
    ]


def _rare_tokens(evidence: Evidence) -> Claim:
    rarest = NUM_RARITY_BINS - 1

    questions = []

    for layer in _layers(evidence, "moxe"):
        questions += [
            Question(
                text=f"layer {layer}: Spearman correlation of difficulty and rarity",
                unit="",
                direction=">",
                bound=0.0,
                measure=partial(
                    evidence.estimate,
                    *[Term(1.0, "moxe", correlation("rho_difficulty_rarity", layer))],
                ),
            ),
            Question(
                text=f"layer {layer}: share of places with mLSTM experts, rarest "
                "minus most frequent tenth",
                unit="",
                direction=">",
                bound=0.0,
                measure=partial(
                    evidence.estimate,
                    *[
                        Term(sign, "moxe", _mlstm_share(layer, rarity_bin))
                        for sign, rarity_bin in ((1.0, rarest), (-1.0, 0))
                    ],
                ),
            ),
        ]

    return Claim(
        key="d",
        title="Rare tokens",
        statement="Difficulty grows with token rarity, and rare tokens go to mLSTM "
        "experts.",
        method="Full MoxE on the held-out documents. Rarity is minus the log of a "
        "token's frequency in the training text; correlations are taken within each "
        "document and averaged. The tenths hold equal shares of the training text. A "
        "token has as many places as experts are chosen for it.",
        questions=questions,
    )


def _collapse(evidence: Evidence) -> Claim:
    def mean_share(system: str, sign: float) -> list[Term]:
        layers = _layers(evidence, system)

        return [
            Term(sign / len(layers), system, _mlstm_share(layer)) for layer in layers
        ]

    with_loss = mean_share("moxe", 1.0)
    without_loss = mean_share("moxe_no_group_loss", 1.0)
    name = "share of places with mLSTM experts, mean over layers"

    return Claim(
        key="e",
        title="Group loss",
        statement="Without L_group the router collapses onto the mLSTM group.",
        method="On the held-out documents after training. Collapsed: more than "
        f"{COLLAPSE_SHARE:.0%} of the places. For L_group to be what prevents it, MoxE "
        "with it must not have collapsed.",
        questions=[
            Question(
                text=f"without L_group: {name}",
                unit="",
                direction=">",
                bound=COLLAPSE_SHARE,
                measure=partial(evidence.estimate, *without_loss),
            ),
            Question(
                text=f"with L_group: {name}",
                unit="",
                direction="<",
                bound=COLLAPSE_SHARE,
                measure=partial(evidence.estimate, *with_loss),
            ),
            Question(
                text=f"without minus with L_group: {name}",
                unit="",
                direction=">",
                bound=0.0,
                measure=partial(
                    evidence.estimate, *[*without_loss, *mean_share("moxe", -1.0)]
                ),
            ),
        ],
    )


def _odds(evidence: Evidence) -> Claim:
    questions = []

    for layer in _layers(evidence, "moxe"):
        slope = [Term(1.0, "moxe", layer_ratio("odds_xy", "odds_xx", layer))]
        explained = [Term(1.0, "moxe", explained_odds(layer))]

        questions += [
            Question(
                text=f"layer {layer}: {text}",
                unit="",
                direction=">" if bound < 1.0 else "<",
                bound=bound,
                measure=partial(evidence.estimate, *terms),
            )
            for text, bound, terms in (
                ("slope of ln(P_m/P_s) on 2 gamma d", 1.0 - SLOPE_MARGIN, slope),
                ("slope of ln(P_m/P_s) on 2 gamma d", 1.0 + SLOPE_MARGIN, slope),
                ("variance of ln(P_m/P_s) explained", EXPLAINED_SHARE, explained),
            )
        ]

    return Claim(
        key="odds",
        title="Odds of the groups",
        statement="The odds of the mLSTM group are about e^(2 gamma d), eqs. (23) to "
        "(43).",
        method="Exactly, ln(P_m/P_s) = 2 gamma d + r with the log odds r of the router "
        "before the bias. So the claim holds as far as r is the same for all tokens: "
        f"the slope is 1 within {SLOPE_MARGIN}, and 2 gamma d alone explains more than "
        f"{EXPLAINED_SHARE:.0%} of the variance (1 - var(r)/var(ln odds), which is "
        "negative where r varies more than the sum). Within documents.",
        questions=questions,
    )


def _loss_of_tokens(evidence: Evidence) -> Claim:
    return Claim(
        key="loss",
        title="Difficulty and loss",
        statement="Predicted difficulty tells which tokens are hard: it grows with the "
        "token's own loss, and with that of the token it has to predict (implied by "
        "the paper's name for it).",
        method="Spearman correlation within each held-out document, averaged. The own "
        "loss is that of the routed token given those before it; the next loss that of "
        "the token after it.",
        questions=[
            Question(
                text=f"layer {layer}: Spearman correlation of difficulty and {name} "
                "loss",
                unit="",
                direction=">",
                bound=0.0,
                measure=partial(
                    evidence.estimate,
                    *[
                        Term(
                            1.0,
                            "moxe",
                            correlation(f"rho_difficulty_{name}_nll", layer),
                        )
                    ],
                ),
            )
            for layer in _layers(evidence, "moxe")
            for name in ("own", "next")
        ],
    )


def _mlstm_share(layer: int, rarity_bin: int | None = None) -> Metric:
    if rarity_bin is None:
        return layer_ratio("mlstm_share", "num_tokens", layer)

    return layer_ratio(
        "bin_mlstm_share", "bin_num_tokens", layer, rarity_bin=rarity_bin
    )


def _layers(evidence: Evidence, system: str) -> range:
    # One layer at least, so that what was not measured is asked for all the same.
    return range(max(1, evidence.num_layers(system)))
