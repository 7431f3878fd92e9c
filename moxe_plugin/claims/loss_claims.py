"""Claims about losses: which system is better, and by how much."""

from __future__ import annotations

from functools import partial
from typing import Final

from moxe_plugin.claims.evidence import Evidence, difference
from moxe_plugin.claims.judging import Claim, Question
from moxe_plugin.claims.metrics import Metric, held_out_loss, word_loss
from moxe_plugin.claims.systems import label_system

MATCH_MARGIN_NATS: Final = 0.05
"""Losses this close count as equal: 5 % of perplexity."""

ABLATIONS: Final = (
    "moxe_gamma0",
    "moxe_standard",
    "moxe_no_group_loss",
    "moxe_ffn",
    "moxe_mlstm",
    "moxe_slstm",
)
"""The paper's ablations; the first two are readings of "no entropy bias"."""

TRANSFORMERS: Final = ("gemma2", "qwen_moe")


def list_loss_claims(evidence: Evidence) -> list[Claim]:
    """List the claims about losses.

    :param evidence: The measured runs.

    :returns: The paper's (a), (b) and (c), and our questions about memory.
    """
    return [
        make(evidence)
        for make in (_validation_loss, _lambada, _ablations, _memory, _dense)
    ]


def _validation_loss(evidence: Evidence) -> Claim:
    compare = partial(_compare, evidence, held_out_loss, "held-out loss")

    return Claim(
        key="a",
        title="Validation loss",
        statement="MoxE matches xLSTM in validation loss, and both beat the "
        "transformers.",
        method="Loss on the held-out documents in nats per token, differences between "
        f"systems of the same seed. Matching: worse by less than {MATCH_MARGIN_NATS} "
        "nats.",
        questions=[
            compare("moxe", "xlstm", "<", bound=MATCH_MARGIN_NATS),
            *(
                compare(system, other, "<")
                for system in ("moxe", "xlstm")
                for other in TRANSFORMERS
            ),
        ],
    )


def _lambada(evidence: Evidence) -> Claim:
    compare = partial(_compare, evidence, word_loss, "LAMBADA last-word loss")

    return Claim(
        key="b",
        title="LAMBADA",
        statement="MoxE beats all baselines on LAMBADA.",
        method="Loss of LAMBADA's last words in nats per word, whose exponential is "
        "lm-evaluation-harness' perplexity; differences between systems of the same "
        "seed.",
        questions=[compare("moxe", o, "<") for o in ("xlstm", *TRANSFORMERS)],
    )


def _ablations(evidence: Evidence) -> Claim:
    metrics: tuple[tuple[Metric, str], ...] = (
        (word_loss, "LAMBADA last-word loss"),
        (held_out_loss, "held-out loss"),
    )

    return Claim(
        key="c",
        title="Ablations",
        statement="Each ablation is worse than full MoxE.",
        method="The ablation's loss minus MoxE's, of the same seed: on LAMBADA, the "
        "paper's measure, and on the held-out documents.",
        questions=[
            _compare(evidence, metric, name, ablation, "moxe", ">")
            for metric, name in metrics
            for ablation in ABLATIONS
        ],
    )


def _memory(evidence: Evidence) -> Claim:
    return Claim(
        key="memory",
        title="Experts with memory",
        statement="At equal compute, experts that remember the tokens routed to them "
        "(subsequence) beat experts without memory (token). Our question; the authors' "
        "code has the latter.",
        method="MoxE's loss minus that of MoxE with `expert_state` token: the same "
        "parameters and the same training; for what a token costs, see Systems.",
        questions=[
            _compare(
                evidence, held_out_loss, "held-out loss", "moxe", "moxe_token", "<"
            ),
            _compare(
                evidence, word_loss, "LAMBADA last-word loss", "moxe", "moxe_token", "<"
            ),
        ],
    )


def _dense(evidence: Evidence) -> Claim:
    return Claim(
        key="dense",
        title="Sparse memory against dense",
        statement="Experts that remember only the tokens routed to them match experts "
        "that read every token, at K/E of the experts' cost. Our question.",
        method="MoxE's loss minus that of MoxE with `expert_state` dense. Matching: "
        f"worse by less than {MATCH_MARGIN_NATS} nats.",
        questions=[
            _compare(
                evidence,
                held_out_loss,
                "held-out loss",
                "moxe",
                "moxe_dense",
                "<",
                bound=MATCH_MARGIN_NATS,
            )
        ],
    )


def _compare(
    evidence: Evidence,
    metric: Metric,
    name: str,
    system: str,
    other: str,
    direction: str,
    *,
    bound: float = 0.0,
) -> Question:
    return Question(
        text=f"{name}: {label_system(system)} minus {label_system(other)}",
        unit="nats per word" if metric is word_loss else "nats per token",
        direction="<" if direction == "<" else ">",
        bound=bound,
        measure=partial(evidence.estimate, *difference(metric, system, other)),
    )
