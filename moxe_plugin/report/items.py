"""What a run got on each document of a task, as CSV: ``items_<task>.csv``.

::

    item,logprob,num_tokens,is_greedy
    8a52b2f5a1c0,-12.3456,3,0

``item`` is a hash of the document's content: runs are paired on equal items only. Lines
keep the order of the documents. Numbers that are not whole have 6 significant digits.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moxe_plugin.report.files import DamagedRecordError, read_text, write_text

ITEM: Final = "item"
LOGPROB: Final = "logprob"
"""Log-likelihood of the continuation or the text, in nats."""

NUM_TOKENS: Final = "num_tokens"
"""How many tokens that is the sum over."""

IS_GREEDY: Final = "is_greedy"
"""1 if each of the tokens is the model's first choice, else 0."""

NUM_WORDS: Final = "num_words"
"""White-space separated words of the text."""

NUM_BYTES: Final = "num_bytes"
"""Bytes of the text in UTF-8."""

ACC: Final = "acc"
"""1 if the right choice is the most likely one, else 0."""

ACC_NORM: Final = "acc_norm"
"""The same with likelihoods per character of the choice."""

EXACT_MATCH: Final = "exact_match"
"""1 if the generated answer is the right one, else 0."""

HEADERS: Final = (
    # A continuation of a context; none is greedy where all tokens are equally likely.
    (LOGPROB, NUM_TOKENS, IS_GREEDY),
    (LOGPROB, NUM_TOKENS),
    # A whole text.
    (LOGPROB, NUM_TOKENS, NUM_WORDS, NUM_BYTES),
    # A choice.
    (ACC, ACC_NORM),
    (ACC,),
    # A generated answer.
    (EXACT_MATCH,),
)
"""The columns after ``item`` that a file may have."""


@dataclass(frozen=True, kw_only=True)
class TaskItems:
    """What a run got on each document of a task."""

    items: Sequence[str]
    """A hash of each document, in order; none occurs twice."""

    columns: Mapping[str, Sequence[float]]
    """Values by name, one per item; the names are one of :data:`HEADERS`, in order."""


def make_task_items(values: Mapping[str, Sequence[Any]]) -> TaskItems:
    """Make items of columns in any order.

    :param values: The column ``item`` and those of one of :data:`HEADERS`.

    :returns: The items.

    :raises ValueError: The columns are not those of a kind of task.
    """
    names = values.keys() - {ITEM}

    for header in HEADERS:
        if names == set(header):
            columns = {name: tuple(map(float, values[name])) for name in header}

            return TaskItems(items=tuple(values[ITEM]), columns=columns)

    raise ValueError(
        f"`values` must have the columns of a kind of task, but has {sorted(names)}."
    )


def write_items(file: Path, task: TaskItems) -> None:
    """Write the items of a task.

    :param file: The CSV file; replaced at once.
    :param task: The items.
    """
    lines = [",".join((ITEM, *task.columns))]

    for item, *values in zip(task.items, *task.columns.values(), strict=True):
        lines.append(",".join((item, *map(_format, values))))

    write_text(file, "".join(f"{line}\n" for line in lines))


def read_items(file: Path) -> TaskItems:
    """Read and check the items of a task.

    :param file: The CSV file.

    :returns: The items.

    :raises DamagedRecordError: A line is truncated, a value is no finite number, an
        item occurs twice, or the columns are not those of a kind of task.
    """
    text = read_text(file)

    if not text.endswith("\n"):
        raise DamagedRecordError(f"{file.name}: the last line is truncated.")

    header, *rows = csv.reader(io.StringIO(text))

    if header[:1] != [ITEM] or tuple(header[1:]) not in HEADERS:
        raise DamagedRecordError(
            f"{file.name}, line 1: `{','.join(header)}` is not a known header."
        )

    values: list[list[float]] = []
    first_lines: dict[str, int] = {}

    for number, row in enumerate(rows, start=2):
        source = f"{file.name}, line {number}"

        if len(row) != len(header):
            raise DamagedRecordError(
                f"{source}: must have {len(header)} values, but has {len(row)} instead."
            )

        first = first_lines.setdefault(row[0], number)
        if first != number or not row[0]:
            raise DamagedRecordError(
                f"{source}: the item `{row[0]}` is that of line {first}."
                if row[0]
                else f"{source}: the item is missing."
            )

        values.append([_parse(value, source) for value in row[1:]])

    columns = {
        name: tuple(row[index] for row in values)
        for index, name in enumerate(header[1:])
    }

    return TaskItems(items=tuple(first_lines), columns=columns)


def _format(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.6g}"


def _parse(text: str, source: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan

    if not math.isfinite(value):
        raise DamagedRecordError(f"{source}: `{text}` is not a finite number.")

    return value
