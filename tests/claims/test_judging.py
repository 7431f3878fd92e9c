"""Verdicts follow from numbers by one rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pytest

from moxe_plugin.claims.judging import Claim, Question, judge
from moxe_plugin.report.statistics import Estimate, MissingNumberError

_NOT_DECIDED = "not decided at this scale"


def _question(
    value: float | None, direction: Literal["<", ">"] = "<", bound: float = 0.0
) -> Question:
    def measure() -> Estimate:
        if value is None:
            raise MissingNumberError("nobody measured it")

        return Estimate(value, value - 1.96, value + 1.96, 1.0, 1e9)

    return Question(
        text="number", unit="", direction=direction, bound=bound, measure=measure
    )


def _judge(*questions: Question) -> tuple[str, Sequence[str]]:
    claim = Claim(
        key="x", title="Title", statement="Claim.", method="", questions=questions
    )
    judgement = judge(claim)

    return judgement.verdict, [answer.verdict for answer in judgement.answers]


@pytest.mark.parametrize(
    ("value", "direction", "bound", "verdict"),
    [
        (-3.0, "<", 0.0, "supported"),
        (3.0, "<", 0.0, "not supported"),
        (3.0, ">", 0.0, "supported"),
        (-3.0, ">", 0.0, "not supported"),
        (-1.9, "<", 0.0, _NOT_DECIDED),
        (1.9, "<", 0.0, _NOT_DECIDED),
        (1.0, "<", 4.0, "supported"),
        (3.0, "<", 4.0, _NOT_DECIDED),
        (7.0, "<", 4.0, "not supported"),
    ],
)
def test_verdict_of_one_number(
    value: float, direction: Literal["<", ">"], bound: float, verdict: str
) -> None:
    assert _judge(_question(value, direction, bound)) == (verdict, [verdict])


def test_a_claim_is_supported_if_all_of_it_is() -> None:
    assert _judge(_question(-4.0), _question(-5.0))[0] == "supported"


def test_a_claim_is_not_supported_if_any_of_it_is_not() -> None:
    verdict, answers = _judge(_question(-4.0), _question(5.0), _question(0.0))

    assert verdict == "not supported"
    assert answers == ["supported", "not supported", _NOT_DECIDED]


def test_an_open_number_leaves_the_claim_open() -> None:
    assert _judge(_question(-4.0), _question(0.1))[0] == _NOT_DECIDED


def test_several_numbers_must_be_clearer_than_one() -> None:
    # p = 0.0357 alone, 0.0714 for the smaller of two.
    assert _judge(_question(-2.1))[0] == "supported"
    assert _judge(_question(-2.1), _question(-2.1))[0] == _NOT_DECIDED


def test_a_missing_number_leaves_the_claim_open_and_says_why() -> None:
    claim = Claim(
        key="x",
        title="Title",
        statement="Claim.",
        method="",
        questions=[_question(-2.1), _question(None)],
    )

    judgement = judge(claim)

    assert judgement.verdict == _NOT_DECIDED
    # What was not measured makes the others no less clear.
    assert [a.verdict for a in judgement.answers] == ["supported", _NOT_DECIDED]
    assert judgement.answers[1].missing == "nobody measured it"
    assert judgement.answers[1].estimate is None
