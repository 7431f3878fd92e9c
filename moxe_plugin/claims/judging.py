"""From an estimate to a verdict: the rule is the same for every claim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from moxe_plugin.report.statistics import (
    Estimate,
    MissingNumberError,
    adjust_holm,
)

Verdict = Literal["supported", "not supported", "not decided at this scale"]

SUPPORTED: Final[Verdict] = "supported"
NOT_SUPPORTED: Final[Verdict] = "not supported"
NOT_DECIDED: Final[Verdict] = "not decided at this scale"

LEVEL: Final = 0.05
"""The level of the tests, after Holm's adjustment within a claim."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One measurable part of a claim: whether a number is below, or above, a bound."""

    text: str
    """What the number is."""

    unit: str
    direction: Literal["<", ">"]
    bound: float
    measure: Callable[[], Estimate]
    """Estimates the number, or raises
    :class:`~moxe_plugin.report.statistics.MissingNumberError`."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What is claimed, and how it is measured."""

    key: str
    """``a`` to ``f`` as in REFERENCE.md, or a word of our own."""

    title: str
    statement: str
    method: str
    questions: Sequence[Question]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to one question."""

    question: Question
    estimate: Estimate | None
    missing: str | None
    """Why there is no estimate."""

    p_value: float | None
    """Of the true value being the bound, adjusted by Holm's method within the claim."""

    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A claim with its answers."""

    claim: Claim
    answers: Sequence[Answer]
    verdict: Verdict


def judge(claim: Claim) -> Judgement:
    """Judge a claim.

    A question is *supported* if its number lies on the claimed side of the bound and
    differs from it at the 5 % level, two-sided, adjusted by Holm's method for the
    questions of the claim; *not supported* if it differs so on the other side; else it
    is *not decided*. A claim is supported if all of its questions are, not supported
    if any of them is not, and else not decided.

    :param claim: The claim.

    :returns: The judgement.
    """
    answers = [_answer(question) for question in claim.questions]

    tested = [idx for idx, answer in enumerate(answers) if answer.p_value is not None]
    p_values = adjust_holm([answers[idx].p_value or 0.0 for idx in tested])

    for idx, p_value in zip(tested, p_values, strict=True):
        verdict = _decide(answers[idx], p_value)
        answers[idx] = replace(answers[idx], p_value=p_value, verdict=verdict)

    return Judgement(claim=claim, answers=answers, verdict=_combine(answers))


def _answer(question: Question) -> Answer:
    try:
        estimate = question.measure()
    except MissingNumberError as ex:
        return Answer(
            question=question,
            estimate=None,
            missing=str(ex),
            p_value=None,
            verdict=NOT_DECIDED,
        )

    return Answer(
        question=question,
        estimate=estimate,
        missing=None,
        p_value=estimate.p_value(question.bound),
        verdict=NOT_DECIDED,
    )


def _decide(answer: Answer, p_value: float) -> Verdict:
    assert answer.estimate is not None

    if p_value >= LEVEL:
        return NOT_DECIDED

    question = answer.question
    is_below = answer.estimate.value < question.bound

    return SUPPORTED if is_below == (question.direction == "<") else NOT_SUPPORTED


def _combine(answers: Sequence[Answer]) -> Verdict:
    verdicts = {answer.verdict for answer in answers}

    if NOT_SUPPORTED in verdicts:
        return NOT_SUPPORTED

    return SUPPORTED if verdicts == {SUPPORTED} else NOT_DECIDED
