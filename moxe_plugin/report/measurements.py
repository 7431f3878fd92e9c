"""What tables report of a run: one number, or none, for each column."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from moxe_plugin.report.records import RunRecord

NLL_KEY: Final = "NLL Loss"
"""fairseq2's display name of the cross-entropy, in nats per token."""

ROLLING_TASK: Final = "moxe_embedded_rolling"
LAST_WORD_TASK: Final = "moxe_embedded_last_word"


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a results table."""

    key: str
    """Name in the CSV file; units end it."""

    heading: str
    meaning: str
    """One sentence for the legend below the table."""

    measure: Callable[[RunRecord], float | None]
    """Reads the number off a run; ``None`` where the run has none."""

    number_format: str
    """How :func:`format` writes the number."""


def _count(value: int | None) -> float | None:
    return None if value is None else float(value)


def _last_loss(lines: object, stage: str) -> float | None:
    assert isinstance(lines, (list, tuple))

    losses = [x[NLL_KEY] for x in lines if x.get("Stage") == stage and NLL_KEY in x]

    return float(losses[-1]) if losses else None


def valid_loss(record: RunRecord) -> float | None:
    """Return the held-out loss of a run.

    :param record: The run.

    :returns: The last validation loss of pretraining, or a guess's loss on the same
        tokens, in nats per token.
    """
    if record.environment.kind == "guess":
        loss = record.evals.get("guess", {}).get("valid_loss_nats")

        return None if loss is None else float(loss)

    return _last_loss(record.valid, "pretrain")


def _valid_perplexity(record: RunRecord) -> float | None:
    loss = valid_loss(record)

    return None if loss is None else math.exp(loss)


def _harness(task: str, metric: str) -> Callable[[RunRecord], float | None]:
    def measure(record: RunRecord) -> float | None:
        for key in ("pretrained", "guess"):
            results: Mapping[str, Mapping[str, float]]
            results = record.evals.get(key, {}).get("results", {})

            value = results.get(task, {}).get(f"{metric},none")
            if value is not None:
                return float(value)

        return None

    return measure


def _instruction_loss(stage: str) -> Callable[[RunRecord], float | None]:
    def measure(record: RunRecord) -> float | None:
        losses = record.evals.get("instructions", {})

        loss = losses.get(stage, {}).get("nll_nats")

        return None if loss is None else float(loss)

    return measure


COLUMNS: Final = (
    Column(
        key="parameters",
        heading="parameters",
        meaning="all parameters of the model",
        measure=lambda r: _count(r.model.num_parameters if r.model else None),
        number_format=",.0f",
    ),
    Column(
        key="active_parameters",
        heading="active",
        meaning="parameters that one token uses: without the input embedding (unless "
        "tied to the output) and without the experts that are not chosen",
        measure=lambda r: _count(r.model.num_active_parameters if r.model else None),
        number_format=",.0f",
    ),
    Column(
        key="training_tokens",
        heading="training tokens",
        meaning="target tokens seen in pretraining, repetitions included",
        measure=lambda r: _count(r.environment.training_tokens),
        number_format=",.0f",
    ),
    Column(
        key="train_loss_nats",
        heading="train loss, nats",
        meaning="cross-entropy over the last logged training interval, nats per token",
        measure=lambda r: _last_loss(r.train, "pretrain"),
        number_format=".3f",
    ),
    Column(
        key="valid_loss_nats",
        heading="valid loss, nats",
        meaning="cross-entropy on the held-out split, nats per token",
        measure=valid_loss,
        number_format=".3f",
    ),
    Column(
        key="valid_perplexity_per_token",
        heading="perplexity per token",
        meaning="exp(valid loss)",
        measure=_valid_perplexity,
        number_format=",.1f",
    ),
    Column(
        key="test_bits_per_byte",
        heading="bits per byte",
        meaning="on the documents of the test split, independent of the tokenizer",
        measure=_harness(ROLLING_TASK, "bits_per_byte"),
        number_format=".3f",
    ),
    Column(
        key="test_perplexity_per_word",
        heading="perplexity per word",
        meaning="on the documents of the test split",
        measure=_harness(ROLLING_TASK, "word_perplexity"),
        number_format=",.0f",
    ),
    Column(
        key="last_word_accuracy",
        heading="last-word accuracy",
        meaning="share of test passages whose last word is the greedy continuation",
        measure=_harness(LAST_WORD_TASK, "acc"),
        number_format=".1%",
    ),
    Column(
        key="instruction_loss_before_nats",
        heading="instruction loss, nats",
        meaning="cross-entropy of held-out answers before finetuning, nats per token",
        measure=_instruction_loss("pretrained"),
        number_format=".3f",
    ),
    Column(
        key="instruction_loss_after_nats",
        heading="after finetuning, nats",
        meaning="the same after finetuning on instructions",
        measure=_instruction_loss("finetuned"),
        number_format=".3f",
    ),
    Column(
        key="throughput_tokens_per_s",
        heading="tokens/s",
        meaning="training tokens over the time of training steps; leaves out "
        "validation, checkpoints and start-up",
        measure=lambda r: r.environment.throughput_tokens_per_s,
        number_format=",.0f",
    ),
    Column(
        key="peak_memory_gib",
        heading="peak memory, GiB",
        meaning="of the training process: resident memory with libraries on cpu, "
        "memory held by tensors on cuda",
        measure=lambda r: r.environment.peak_memory_gib,
        number_format=".2f",
    ),
    Column(
        key="wall_s",
        heading="wall time, s",
        meaning="all stages: pretraining, finetuning, evaluation",
        measure=lambda r: sum(r.environment.wall_s.values()) or None,
        number_format=",.0f",
    ),
)
"""The columns of a results table, in order."""
