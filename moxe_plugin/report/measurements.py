"""What tables report of a run: one number, or none, for each column."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from moxe_plugin.report.records import RunRecord
from moxe_plugin.report.scores import Score, score_run
from moxe_plugin.report.statistics import Array

NLL_KEY: Final = "NLL Loss"
"""fairseq2's display name of the cross-entropy, in nats per token."""

_AGREEMENT: Final = 1e-4
"""How far, relatively, a number of the harness may be from that of its items, which
have 6 digits."""

Measure = Callable[[RunRecord], float | None]
"""Reads a number off a run; ``None`` where the run has none."""

Group = Literal["Model", "Training", "LAMBADA", "Texts", "Questions", "Cost"]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a results table."""

    key: str
    """Name in the CSV file; units end it."""

    heading: str
    group: Group
    """The part of a page that shows it."""

    meaning: str
    """One sentence for the legend below the table."""

    measure: Measure
    """Reads the number as it was recorded."""

    number_format: str
    """How :func:`format` writes the number."""

    lower_is_better: bool | None = None
    """``None`` for what is not judged."""

    compared: bool = False
    """Whether systems are tested against each other by this number. Of numbers that
    rank systems alike, such as a loss and its exponential, one is."""

    score: Score | None = None
    """How the number follows from items; ``None`` for what is not made of items."""

    log_scale: bool = False
    """Whether the number is the exponential of what is averaged and compared."""

    unit: str = ""
    """The unit of differences: of logarithms if ``log_scale``."""

    def to_scale(self, number: float) -> float:
        """Turn the number into what is compared.

        :param number: As the column shows it.

        :returns: Its logarithm if ``log_scale``.
        """
        return math.log(number) if self.log_scale else number

    def from_scale(self, values: Array) -> Array:
        """Turn what is compared into numbers.

        :param values: Values on the scale of comparison.

        :returns: As the column shows them.
        """
        return np.exp(values) if self.log_scale else values

    def read(self, record: RunRecord) -> float | None:
        """Read the number off a run.

        :param record: The run.

        :returns: What was recorded, or else what follows from the items.
        """
        number = self.measure(record)

        return self._read_items(record) if number is None else number

    def disagrees(self, record: RunRecord) -> bool:
        """Tell whether the items of a run give another number than was recorded.

        :param record: The run.

        :returns: Whether both are there and differ by more than rounding.
        """
        recorded, counted = self.measure(record), self._read_items(record)

        if recorded is None or counted is None:
            return False

        return not math.isclose(
            recorded, counted, rel_tol=_AGREEMENT, abs_tol=_AGREEMENT**2
        )

    def _read_items(self, record: RunRecord) -> float | None:
        if self.score is None or (value := score_run(record, self.score)) is None:
            return None

        return float(self.from_scale(np.asarray(value)))


def read_nothing(_: RunRecord) -> None:
    """Read no number: the column has items only."""


def last_loss(split: Literal["train", "valid"]) -> Measure:
    """Make the reader of the last loss of pretraining.

    :param split: ``train`` or ``valid``.

    :returns: The reader; nats per token.
    """

    def measure(record: RunRecord) -> float | None:
        lines = record.train if split == "train" else record.valid

        losses = [
            line[NLL_KEY]
            for line in lines
            if line.get("Stage") == "pretrain" and NLL_KEY in line
        ]

        return float(losses[-1]) if losses else None

    return measure


def valid_loss(record: RunRecord) -> float | None:
    """Return the held-out loss of a run.

    :param record: The run.

    :returns: The last validation loss of pretraining, or a guess's loss on the same
        tokens, in nats per token.
    """
    if record.environment.kind == "guess":
        loss = record.evals.get("guess", {}).get("valid_loss_nats")

        return None if loss is None else float(loss)

    return last_loss("valid")(record)


def valid_perplexity(record: RunRecord) -> float | None:
    """Return the exponential of the held-out loss.

    :param record: The run.

    :returns: The perplexity per token.
    """
    loss = valid_loss(record)

    return None if loss is None else math.exp(loss)


def harness_metric(
    task: str,
    metric: str,
    *,
    stages: tuple[str, ...] = ("pretrained", "guess"),
    filter_name: str = "none",
) -> Measure:
    """Make the reader of a metric of lm-evaluation-harness.

    :param task: The task.
    :param metric: The metric.
    :param stages: Whose results count: the first stage's that has any.
    :param filter_name: The harness' filter of answers.

    :returns: The reader.
    """

    def measure(record: RunRecord) -> float | None:
        for stage in stages:
            results: Mapping[str, Mapping[str, float]]
            results = record.evals.get(stage, {}).get("results", {})

            value = results.get(task, {}).get(f"{metric},{filter_name}")
            if value is not None:
                return float(value)

        return None

    return measure


def instruction_loss(stage: str) -> Measure:
    """Make the reader of the loss of held-out answers.

    :param stage: ``pretrained`` or ``finetuned``.

    :returns: The reader; nats per token.
    """

    def measure(record: RunRecord) -> float | None:
        losses = record.evals.get("instructions", {})

        loss = losses.get(stage, {}).get("nll_nats")

        return None if loss is None else float(loss)

    return measure
