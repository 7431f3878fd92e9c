"""Numbers that are a sum over a sum of what runs got on the items of a task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from moxe_plugin.report.items import (
    ACC,
    ACC_NORM,
    EXACT_MATCH,
    IS_GREEDY,
    LOGPROB,
    NUM_BYTES,
    NUM_TOKENS,
    NUM_WORDS,
    TaskItems,
)
from moxe_plugin.report.records import RunRecord
from moxe_plugin.report.statistics import Array, MissingNumberError, Ratio

_ITEM_COUNT: Final = "1"
"""Stands for a denominator that counts items."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How a number follows from the items of a task."""

    task: str
    numerator: str
    """The column above the line."""

    denominator: str = _ITEM_COUNT
    """The column below the line; the number of items by default."""

    factor: float = 1.0
    """What the numerator is multiplied by."""


class ItemValues(NamedTuple):
    """What the runs of a system got on the same items."""

    items: tuple[str, ...]
    """The items, sorted."""

    ratio: Ratio
    """By seed and item, in the order of ``items``."""


def word_nats(task: str) -> Score:
    """Score the target words of a task of continuations.

    :param task: The task.

    :returns: Nats per word; its exponential is the harness' ``perplexity``.
    """
    return Score(task=task, numerator=LOGPROB, factor=-1.0)


def token_nats(task: str) -> Score:
    """Score the tokens of the target words or texts of a task.

    :param task: The task.

    :returns: Nats per token.
    """
    return Score(task=task, numerator=LOGPROB, denominator=NUM_TOKENS, factor=-1.0)


def greedy_share(task: str) -> Score:
    """Score how often the target word is the greedy continuation.

    :param task: The task.

    :returns: A share of the items.
    """
    return Score(task=task, numerator=IS_GREEDY)


def text_bits_per_byte(task: str) -> Score:
    """Score whole texts by their bytes.

    :param task: The task.

    :returns: Bits per byte.
    """
    return Score(
        task=task,
        numerator=LOGPROB,
        denominator=NUM_BYTES,
        factor=-1.0 / math.log(2.0),
    )


def text_word_nats(task: str) -> Score:
    """Score whole texts by their words.

    :param task: The task.

    :returns: Nats per word; its exponential is the harness' ``word_perplexity``.
    """
    return Score(task=task, numerator=LOGPROB, denominator=NUM_WORDS, factor=-1.0)


def choice_share(task: str, *, normalized: bool = False) -> Score:
    """Score how often the right choice is the most likely one.

    :param task: The task.
    :param normalized: Whether likelihoods are per character of the choice.

    :returns: A share of the items.
    """
    return Score(task=task, numerator=ACC_NORM if normalized else ACC)


def answer_share(task: str) -> Score:
    """Score how often the generated answer is the right one.

    :param task: The task.

    :returns: A share of the items.
    """
    return Score(task=task, numerator=EXACT_MATCH)


def score_run(record: RunRecord, score: Score) -> float | None:
    """Compute a number of one run.

    :param record: The run.
    :param score: The number.

    :returns: Numerators over denominators; ``None`` if the run has no such items, or
        what is below the line is 0.
    """
    task = record.items.get(score.task)

    if task is None or not has_columns(task, score) or not task.items:
        return None

    _, numerators, denominators = _read_sorted(task, score)
    total = float(denominators.sum())

    return float(numerators.sum()) / total if total > 0.0 else None


def has_columns(task: TaskItems, score: Score) -> bool:
    """Tell whether a task's items have what a number is made of.

    :param task: The items.
    :param score: The number.

    :returns: Whether they do.
    """
    return score.numerator in task.columns and (
        score.denominator == _ITEM_COUNT or score.denominator in task.columns
    )


def stack_runs(records: Sequence[RunRecord], score: Score) -> ItemValues:
    """Line up the items of the runs of a system.

    :param records: The runs, one a seed.
    :param score: The number.

    :returns: The values by seed and item.

    :raises MissingNumberError: A run has no such items, or not those of the others.
    """
    tables = []

    for record in records:
        task = record.items.get(score.task)

        if task is None or not has_columns(task, score) or not task.items:
            raise MissingNumberError(f"`{record.name}` has no items of {score.task}")

        tables.append(_read_sorted(task, score))

        if tables[-1][0] != tables[0][0]:
            overlap = describe_overlap(tables[-1][0], tables[0][0])

            raise MissingNumberError(
                f"`{record.name}` and `{records[0].name}` were scored on different "
                f"items of {score.task} ({overlap})"
            )

    return ItemValues(
        items=tables[0][0],
        ratio=Ratio(
            np.stack([numerators for _, numerators, _ in tables]),
            np.stack([denominators for _, _, denominators in tables]),
        ),
    )


def describe_overlap(items: Sequence[str], others: Sequence[str]) -> str:
    """Say how many items two runs have in common.

    :param items: Items of one.
    :param others: Items of the other.

    :returns: For example ``100 and 5,153, of which 100 in common``.
    """
    num_common = len(set(items) & set(others))

    return f"{len(items):,} and {len(others):,}, of which {num_common:,} in common"


def _read_sorted(task: TaskItems, score: Score) -> tuple[tuple[str, ...], Array, Array]:
    order = sorted(range(len(task.items)), key=task.items.__getitem__)

    numerators = np.asarray(task.columns[score.numerator], dtype=np.float64)
    denominators = (
        np.ones(len(order))
        if score.denominator == _ITEM_COUNT
        else np.asarray(task.columns[score.denominator], dtype=np.float64)
    )

    return (
        tuple(task.items[idx] for idx in order),
        score.factor * numerators[order],
        denominators[order],
    )
