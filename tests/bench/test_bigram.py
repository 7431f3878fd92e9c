"""The bigram guess, as a language model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq2.datasets import SequenceBatch
from fairseq2.nn import BatchLayout
from scipy.sparse import csr_array

from moxe_plugin.bench import bigram
from moxe_plugin.bench.bigram import BigramLM, count_bigrams
from moxe_plugin.bench.guesses import unigram_logprobs
from moxe_plugin.bench.scoring import measure_loss
from moxe_plugin.data.shard_writer import ShardWriter
from moxe_plugin.data.tokens import TokensConfig, TokensDataset, open_tokens
from moxe_plugin.eval.batching import Batching
from moxe_plugin.eval.scoring import Score, score_continuations

# The text 0 1 0 1 0 2: 0 is followed by 1 twice and by 2 once, 1 by 0 twice, 2 by none.
COUNTS = [[0, 2, 1], [2, 0, 0], [0, 0, 0]]
UNIGRAM = [4 / 9, 3 / 9, 2 / 9]  # of 3, 2 and 1, each with one more

# After 0: 3 pairs of 2 kinds, hence (c + 2 p) / 5. After 1: 2 of one, (c + p) / 3.
PROBS = [
    [8 / 45, (2 + 6 / 9) / 5, (1 + 4 / 9) / 5],
    [(2 + 4 / 9) / 3, 1 / 9, 2 / 27],
    UNIGRAM,
]


def _create() -> BigramLM:
    counts = csr_array(np.array(COUNTS))

    return BigramLM(counts, unigram_logprobs(np.array([3, 2, 1])), 8).eval()


def _open(path: Path, ids: list[int]) -> TokensDataset:
    writer = ShardWriter(
        path,
        tokenizer_name="none",
        tokenizer_sha256="0" * 64,
        vocab_size=5,
        eos_idx=0,
        source="tests",
    )
    with writer:
        writer.add_document("train", ids, len(ids))

    return open_tokens(TokensConfig(path=path))


def test_frequency_after_a_token_is_interpolated_with_that_anywhere() -> None:
    seqs = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 1]])

    logits = _create()(seqs, BatchLayout.of(seqs))

    expected = torch.tensor(PROBS)[seqs]

    assert torch.allclose(logits.exp(), expected)
    assert torch.allclose(logits.exp().sum(-1), torch.ones(2, 4))


def test_token_that_nothing_followed_predicts_the_unigram() -> None:
    seqs = torch.tensor([[2]])

    logits = _create()(seqs, BatchLayout.of(seqs))

    assert logits.exp().flatten().tolist() == pytest.approx(UNIGRAM)


def test_rows_without_pairs_between_others_change_none() -> None:
    counts = np.zeros((6, 6), dtype=np.int64)
    counts[1, 4], counts[3, 0], counts[3, 5] = 3, 1, 2
    model = BigramLM(csr_array(counts), np.log(np.full(6, 1 / 6)), 8).eval()
    seqs = torch.tensor([[5, 3, 0, 1, 3, 2]])

    probs = model(seqs, BatchLayout.of(seqs)).exp()[0]

    dense = np.full((6, 6), 1 / 6)
    dense[1] = (counts[1] + 1 / 6) / 4
    dense[3] = (counts[3] + 2 / 6) / 5
    assert probs.tolist() == pytest.approx(dense[seqs[0].numpy()])


def test_loss_is_that_of_pairs() -> None:
    loss = measure_loss(_create(), [SequenceBatch(torch.tensor([[0, 1, 0, 2]]), None)])

    expected = math.log(PROBS[0][1]) + math.log(PROBS[1][0]) + math.log(PROBS[0][2])

    assert loss["num_tokens"] == 3
    assert loss["nll_nats"] == pytest.approx(-expected / 3)


def test_continuation_is_scored_as_a_model_s() -> None:
    scores: dict[int, Score] = {}

    score_continuations(
        _create(),
        [([2, 0], [1, 0]), ([1], [1])],
        max_length=8,
        batching=Batching(batch_size=2, vocab_size=3),
        on_scored=scores.__setitem__,
    )

    assert scores[0].logprob == pytest.approx(math.log(PROBS[0][1] * PROBS[1][0]))
    assert scores[0].is_greedy
    assert scores[1].logprob == pytest.approx(math.log(1 / 9))
    assert not scores[1].is_greedy


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_every_neighbour_is_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(bigram, "_COUNT_CHUNK", chunk)

    counts = count_bigrams(_open(tmp_path / "shards", [1, 2, 1, 2, 4]), "train")

    # The stream: 0 1 2 1 2 4 0
    expected = np.zeros((5, 5), dtype=np.int64)
    expected[0, 1], expected[1, 2], expected[2, 1] = 1, 2, 1
    expected[2, 4], expected[4, 0] = 1, 1
    assert counts.nnz == 5
    assert counts.toarray().tolist() == expected.tolist()
