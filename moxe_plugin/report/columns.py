"""The columns of results tables."""

from __future__ import annotations

from typing import Final

from moxe_plugin.report.measurements import (
    Column,
    Group,
    harness_metric,
    instruction_loss,
    last_loss,
    read_nothing,
    valid_loss,
    valid_perplexity,
)
from moxe_plugin.report.scores import (
    answer_share,
    choice_share,
    greedy_share,
    text_bits_per_byte,
    text_word_nats,
    token_nats,
    word_nats,
)

LAMBADA_TASK: Final = "moxe_lambada"
LAST_WORD_TASK: Final = "moxe_embedded_last_word"
ROLLING_TASK: Final = "moxe_rolling"
EMBEDDED_ROLLING_TASK: Final = "moxe_embedded_rolling"
FINEWEB_EDU_TASK: Final = "moxe_fineweb_edu_256"
MULTIPLE_CHOICE_TASK: Final = "moxe_multiple_choice"
GSM8K_TASK: Final = "moxe_gsm8k"

LAMBADA_PERPLEXITY: Final = "lambada_perplexity_per_word"
"""Key of the number that the paper's Table 2 and Figure 4 are compared with."""


def _count(value: int | None) -> float | None:
    return None if value is None else float(value)


_MODEL: Final = (
    Column(
        key="parameters",
        heading="parameters",
        group="Model",
        meaning="all parameters of the model",
        measure=lambda r: _count(r.model.num_parameters if r.model else None),
        number_format=",.0f",
    ),
    Column(
        key="active_parameters",
        heading="active",
        group="Model",
        meaning="parameters that one token uses: without the input embedding (unless "
        "tied to the output) and without the experts that are not chosen",
        measure=lambda r: _count(r.model.num_active_parameters if r.model else None),
        number_format=",.0f",
    ),
    Column(
        key="training_tokens",
        heading="training tokens",
        group="Model",
        meaning="target tokens seen in pretraining, repetitions included",
        measure=lambda r: _count(r.environment.training_tokens),
        number_format=",.0f",
    ),
)

_TRAINING: Final = (
    Column(
        key="train_loss_nats",
        heading="train loss, nats",
        group="Training",
        meaning="cross-entropy over the last logged training interval, nats per token",
        measure=last_loss("train"),
        number_format=".3f",
        lower_is_better=True,
    ),
    Column(
        key="valid_loss_nats",
        heading="valid loss, nats",
        group="Training",
        meaning="cross-entropy on the held-out split, nats per token",
        measure=valid_loss,
        number_format=".3f",
        lower_is_better=True,
        compared=True,
        unit="nats per token",
    ),
    Column(
        key="valid_perplexity_per_token",
        heading="perplexity per token",
        group="Training",
        meaning="exp(valid loss)",
        measure=valid_perplexity,
        number_format=",.1f",
        lower_is_better=True,
    ),
    Column(
        key="instruction_loss_before_nats",
        heading="instruction loss, nats",
        group="Training",
        meaning="cross-entropy of held-out answers before finetuning, nats per token",
        measure=instruction_loss("pretrained"),
        number_format=".3f",
        lower_is_better=True,
    ),
    Column(
        key="instruction_loss_after_nats",
        heading="after finetuning, nats",
        group="Training",
        meaning="the same after finetuning on instructions",
        measure=instruction_loss("finetuned"),
        number_format=".3f",
        lower_is_better=True,
        compared=True,
        unit="nats per token",
    ),
)


def _last_word_columns(
    task: str, prefix: str, name: str, group: Group
) -> tuple[Column, ...]:
    return (
        Column(
            key=f"{prefix}_perplexity_per_word",
            heading=f"{name} perplexity per word",
            group=group,
            meaning="exp of the mean over passages of the nats of the whole last word, "
            "as lm-evaluation-harness defines perplexity; chance is far above the size "
            "of the vocabulary",
            measure=harness_metric(task, "perplexity"),
            number_format=",.0f",
            lower_is_better=True,
            compared=True,
            score=word_nats(task),
            log_scale=True,
            unit="nats per word",
        ),
        Column(
            key=f"{prefix}_perplexity_per_token",
            heading=f"{name} perplexity per token",
            group=group,
            meaning="exp of the nats of all last words over their tokens; chance is "
            "the size of the vocabulary",
            measure=read_nothing,
            number_format=",.1f",
            lower_is_better=True,
            score=token_nats(task),
            log_scale=True,
            unit="nats per token",
        ),
        Column(
            key=f"{prefix}_accuracy",
            heading=f"{name} accuracy",
            group=group,
            meaning="share of passages whose last word is the greedy continuation",
            measure=harness_metric(task, "acc"),
            number_format=".2%",
            lower_is_better=False,
            compared=True,
            score=greedy_share(task),
            unit="share of passages",
        ),
    )


def _text_columns(task: str, prefix: str, name: str, what: str) -> tuple[Column, ...]:
    return (
        Column(
            key=f"{prefix}_bits_per_byte",
            heading=f"{name} bits per byte",
            group="Texts",
            meaning=f"on {what}; independent of the tokenizer",
            measure=harness_metric(task, "bits_per_byte"),
            number_format=".3f",
            lower_is_better=True,
            compared=True,
            score=text_bits_per_byte(task),
            unit="bits per byte",
        ),
        Column(
            key=f"{prefix}_perplexity_per_word",
            heading=f"{name} perplexity per word",
            group="Texts",
            meaning=f"on {what}; a word is what white space separates",
            measure=harness_metric(task, "word_perplexity"),
            number_format=",.0f",
            lower_is_better=True,
            score=text_word_nats(task),
            log_scale=True,
            unit="nats per word",
        ),
    )


_QUESTIONS: Final = (
    Column(
        key="multiple_choice_accuracy",
        heading="multiple choice acc",
        group="Questions",
        meaning="share of questions of the suite's file whose right choice is the most "
        "likely one",
        measure=harness_metric(MULTIPLE_CHOICE_TASK, "acc"),
        number_format=".1%",
        lower_is_better=False,
        compared=True,
        score=choice_share(MULTIPLE_CHOICE_TASK),
        unit="share of questions",
    ),
    Column(
        key="multiple_choice_accuracy_norm",
        heading="multiple choice acc_norm",
        group="Questions",
        meaning="the same with likelihoods per character of the choice",
        measure=harness_metric(MULTIPLE_CHOICE_TASK, "acc_norm"),
        number_format=".1%",
        lower_is_better=False,
        compared=True,
        score=choice_share(MULTIPLE_CHOICE_TASK, normalized=True),
        unit="share of questions",
    ),
    Column(
        key="gsm8k_exact_match",
        heading="GSM8K exact match",
        group="Questions",
        meaning="share of problems whose generated answer is right, after finetuning",
        measure=harness_metric(
            GSM8K_TASK, "exact_match", stages=("finetuned",), filter_name="strict"
        ),
        number_format=".2%",
        lower_is_better=False,
        compared=True,
        score=answer_share(GSM8K_TASK),
        unit="share of problems",
    ),
)

_COST: Final = (
    Column(
        key="throughput_tokens_per_s",
        heading="tokens/s",
        group="Cost",
        meaning="training tokens over the time of training steps; leaves out "
        "validation, checkpoints and start-up",
        measure=lambda r: r.environment.throughput_tokens_per_s,
        number_format=",.0f",
        lower_is_better=False,
    ),
    Column(
        key="peak_memory_gib",
        heading="peak memory, GiB",
        group="Cost",
        meaning="of the training process: resident memory with libraries on cpu, "
        "memory held by tensors on cuda",
        measure=lambda r: r.environment.peak_memory_gib,
        number_format=".2f",
        lower_is_better=True,
    ),
    Column(
        key="wall_s",
        heading="wall time, s",
        group="Cost",
        meaning="all stages: pretraining, finetuning, evaluation",
        measure=lambda r: sum(r.environment.wall_s.values()) or None,
        number_format=",.0f",
        lower_is_better=True,
    ),
)

COLUMNS: Final[tuple[Column, ...]] = (
    *_MODEL,
    *_TRAINING,
    *_last_word_columns(LAMBADA_TASK, "lambada", "LAMBADA", "LAMBADA"),
    *_last_word_columns(LAST_WORD_TASK, "last_word", "last-word", "Texts"),
    *_text_columns(
        EMBEDDED_ROLLING_TASK, "test", "test", "the documents of the test split"
    ),
    *_text_columns(ROLLING_TASK, "rolling", "rolling", "the documents of the suite"),
    *_text_columns(
        FINEWEB_EDU_TASK,
        "fineweb_edu_256",
        "FineWeb-Edu-256",
        "documents of FineWeb-Edu in windows of 256 tokens, the paper's validation",
    ),
    *_QUESTIONS,
    *_COST,
)
"""The columns of a results table, in order."""

COLUMNS_BY_KEY: Final = {column.key: column for column in COLUMNS}

GROUPS: Final[tuple[Group, ...]] = tuple(
    dict.fromkeys(column.group for column in COLUMNS)
)
"""The parts of a page, in order."""
