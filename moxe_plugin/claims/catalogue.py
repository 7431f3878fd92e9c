"""All claims that are judged: the paper's, and questions of our own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from moxe_plugin.claims.evidence import Evidence
from moxe_plugin.claims.judging import Claim, Question
from moxe_plugin.claims.loss_claims import list_loss_claims
from moxe_plugin.claims.routing_claims import list_routing_claims
from moxe_plugin.report.statistics import (
    Estimate,
    MissingNumberError,
    estimate_samples,
)

LINEAR_EXPONENT: Final = 1.1
"""Time that grows with less than this power of length counts as linear."""

_ORDER: Final = ("a", "b", "c", "d", "e", "f", "odds", "loss", "memory", "dense")


def list_claims(evidence: Evidence, exponents: Sequence[float] | None) -> list[Claim]:
    """List the claims with their questions.

    :param evidence: The measured runs.
    :param exponents: Of MoxE's time over length, one a round; ``None`` if time was not
        measured.

    :returns: The claims, those of the paper first.
    """
    claims = [
        *list_loss_claims(evidence),
        *list_routing_claims(evidence),
        _linear_time(exponents),
    ]

    return sorted(claims, key=lambda claim: _ORDER.index(claim.key))


def _linear_time(exponents: Sequence[float] | None) -> Claim:
    def measure() -> Estimate:
        if exponents is None:
            raise MissingNumberError("time was not measured (`--time`)")

        return estimate_samples(exponents)

    return Claim(
        key="f",
        title="Linear cost",
        statement="The cost of MoxE is linear in the length of the text.",
        method="Time of one forward pass over one sequence, by its length; the "
        "exponent is the slope of log time on log length. Lengths take turns, and each "
        "round of all lengths gives an exponent; the interval is over rounds, not over "
        f"seeds. Linear: an exponent below {LINEAR_EXPONENT}.",
        questions=[
            Question(
                text="MoxE: exponent of time over length",
                unit="",
                direction="<",
                bound=LINEAR_EXPONENT,
                measure=measure,
            )
        ],
    )
