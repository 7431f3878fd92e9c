"""Tests of moxe_plugin/eval/batching.py."""

from __future__ import annotations

import torch

from moxe_plugin.eval.batching import Batching, make_batchings


def test_similar_lengths_share_a_batch_the_longest_first() -> None:
    batching = Batching(batch_size=2, vocab_size=10)

    assert batching.make_batches([3, 9, 5, 7, 1]) == [[1, 3], [2, 0], [4]]


def test_auto_keeps_to_the_budget_of_tokens() -> None:
    batches = Batching(batch_size="auto", vocab_size=10).make_batches([2**12] * 9)

    assert [len(batch) for batch in batches] == [4, 4, 1]


def test_auto_keeps_to_the_budget_of_logits() -> None:
    # 2**28 logits are 4096 tokens of this vocabulary.
    batching = Batching(batch_size="auto:3", vocab_size=2**16)

    assert [len(batch) for batch in batching.make_batches([2**11] * 5)] == [2, 2, 1]


def test_auto_never_makes_an_empty_batch() -> None:
    batching = Batching(batch_size="auto", vocab_size=2**16)

    assert batching.make_batches([2**20, 1]) == [[0], [1]]


def test_auto_can_be_limited() -> None:
    batching = Batching(batch_size="auto", vocab_size=10, max_batch_size=2)

    assert [len(batch) for batch in batching.make_batches([1] * 5)] == [2, 2, 1]


def test_auto_keeps_to_the_budget_of_states() -> None:
    batching = Batching(batch_size="auto", vocab_size=10)

    # 1 GiB holds two states.
    batches = batching.make_batches([1] * 3, state_bytes=2**29)

    assert [len(batch) for batch in batches] == [2, 1]
    assert [len(b) for b in batching.make_batches([1, 1], state_bytes=2**31)] == [1, 1]


def test_auto_keeps_to_fewer_tokens_where_it_is_told() -> None:
    batching = Batching(batch_size="auto", vocab_size=10, max_tokens=2**11)

    assert [len(batch) for batch in batching.make_batches([2**9] * 5)] == [4, 1]


def test_a_cpu_scores_fewer_tokens_at_a_time_than_it_generates() -> None:
    scoring, generating = make_batchings(
        "auto", 3, vocab_size=10, device=torch.device("cpu")
    )

    assert [len(b) for b in scoring.make_batches([2**9] * 5)] == [2, 2, 1]
    assert [len(b) for b in generating.make_batches([2**9] * 5)] == [3, 2]


def test_a_gpu_generates_with_more_states_than_it_scores_with() -> None:
    scoring, generating = make_batchings(
        "auto", None, vocab_size=10, device=torch.device("cuda")
    )

    assert [len(b) for b in scoring.make_batches([1] * 5, 2**28)] == [4, 1]
    assert [len(b) for b in generating.make_batches([1] * 5, 2**28)] == [5]
