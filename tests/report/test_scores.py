"""Numbers that follow from items."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from moxe_plugin.report.columns import COLUMNS, COLUMNS_BY_KEY
from moxe_plugin.report.items import TaskItems
from moxe_plugin.report.records import RunRecord
from moxe_plugin.report.scores import score_run, stack_runs, token_nats, word_nats
from moxe_plugin.report.statistics import MissingNumberError
from tests.report.synthetic import make_trained
from tests.report.synthetic_items import LAMBADA, make_lambada, make_scored


def _with_items(task: str, **columns: tuple[float, ...]) -> RunRecord:
    num_items = len(next(iter(columns.values())))
    items = TaskItems(items=tuple(map(str, range(num_items))), columns=columns)

    return replace(make_trained(), evals={}, items={task: items})


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        # 2 words of 3 + 6 nats and 1 + 2 tokens, one of which is greedy
        ("lambada_perplexity_per_word", math.exp(9 / 2)),
        ("lambada_perplexity_per_token", math.exp(9 / 3)),
        ("lambada_accuracy", 1 / 2),
    ],
)
def test_numbers_of_words(key: str, expected: float) -> None:
    record = _with_items(
        LAMBADA, logprob=(-3.0, -6.0), num_tokens=(1.0, 2.0), is_greedy=(1.0, 0.0)
    )

    assert COLUMNS_BY_KEY[key].read(record) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        # 100 nats over 80 bytes and 16 words
        ("rolling_bits_per_byte", 100 / 80 / math.log(2)),
        ("rolling_perplexity_per_word", math.exp(100 / 16)),
    ],
)
def test_numbers_of_texts(key: str, expected: float) -> None:
    record = _with_items(
        "moxe_rolling",
        logprob=(-40.0, -60.0),
        num_tokens=(20.0, 10.0),
        num_words=(10.0, 6.0),
        num_bytes=(50.0, 30.0),
    )

    assert COLUMNS_BY_KEY[key].read(record) == pytest.approx(expected)


def test_numbers_of_questions() -> None:
    choices = _with_items(
        "moxe_multiple_choice", acc=(1.0, 0.0, 0.0, 0.0), acc_norm=(1.0, 1.0, 0.0, 0.0)
    )
    answers = _with_items("moxe_gsm8k", exact_match=(0.0, 1.0, 1.0))

    assert COLUMNS_BY_KEY["multiple_choice_accuracy"].read(choices) == 0.25
    assert COLUMNS_BY_KEY["multiple_choice_accuracy_norm"].read(choices) == 0.5
    assert COLUMNS_BY_KEY["gsm8k_exact_match"].read(answers) == pytest.approx(2 / 3)


def test_guess_without_a_greedy_token_has_no_accuracy() -> None:
    record = _with_items(LAMBADA, logprob=(-3.0,), num_tokens=(1.0,))

    assert COLUMNS_BY_KEY["lambada_accuracy"].read(record) is None
    assert COLUMNS_BY_KEY["lambada_perplexity_per_word"].read(record) is not None


def test_recorded_number_goes_before_that_of_items_and_must_agree() -> None:
    column = COLUMNS_BY_KEY["lambada_perplexity_per_word"]
    record = make_scored("moxe", 1, np.array([1.0, 2.0]))
    other = replace(record, items={LAMBADA: make_lambada(np.array([1.0, 2.1]))})

    assert column.read(other) == column.read(record)
    assert not any(column.disagrees(record) for column in COLUMNS)
    assert column.disagrees(other)


def test_runs_are_stacked_by_item_whatever_their_order() -> None:
    nll = np.array([1.0, 2.0, 4.0])
    items = make_lambada(nll)
    backwards = TaskItems(
        items=items.items[::-1],
        columns={name: values[::-1] for name, values in items.columns.items()},
    )
    runs = [
        replace(make_trained(seed=1), items={LAMBADA: items}),
        replace(make_trained(seed=2), items={LAMBADA: backwards}),
    ]

    values = stack_runs(runs, word_nats(LAMBADA))

    assert values.items == items.items
    assert values.ratio.numerators.tolist() == [[1.0, 2.0, 4.0]] * 2
    assert values.ratio.denominators.tolist() == [[1.0] * 3] * 2
    assert score_run(runs[1], token_nats(LAMBADA)) == pytest.approx(7 / 6)


def test_seeds_with_other_items_are_not_stacked() -> None:
    runs = [
        replace(make_trained(seed=1), items={LAMBADA: make_lambada(np.ones(3))}),
        replace(
            make_trained(seed=2), items={LAMBADA: make_lambada(np.ones(3), first=1)}
        ),
    ]

    with pytest.raises(MissingNumberError, match="3 and 3, of which 2 in common"):
        stack_runs(runs, word_nats(LAMBADA))

    with pytest.raises(MissingNumberError, match=r"_s3` has no items of moxe_lambada"):
        stack_runs([*runs[:1], make_trained(seed=3)], word_nats(LAMBADA))
