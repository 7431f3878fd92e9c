"""Guesses that need no model, as language models."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fairseq2.datasets import SequenceBatch
from fairseq2.nn import BatchLayout

from moxe_plugin.bench.guesses import GuessLM, uniform_logprobs, unigram_logprobs
from moxe_plugin.bench.scoring import measure_loss


def test_uniform_guess_costs_the_logarithm_of_the_vocabulary() -> None:
    assert uniform_logprobs(2048) == pytest.approx([-math.log(2048)] * 2048)


def test_unigram_guess_is_the_smoothed_frequency() -> None:
    logprobs = unigram_logprobs(np.array([5, 0, 2]))

    # 7 tokens and one more of each of the 3 in the vocabulary
    assert np.exp(logprobs) == pytest.approx([6 / 10, 1 / 10, 3 / 10])


def test_guess_predicts_the_same_whatever_it_reads() -> None:
    logprobs = torch.tensor(unigram_logprobs(np.array([5, 0, 2])))
    model = GuessLM(logprobs, max_seq_len=8)
    seqs = torch.tensor([[0, 1, 2, 0], [2, 2, 1, 1]])

    logits = model(seqs, BatchLayout.of(seqs))

    assert logits.shape == (2, 4, 3)
    assert (logits == logprobs).all()


def test_loss_is_the_mean_over_the_counted_targets() -> None:
    counts = np.array([5, 0, 2])
    model = GuessLM(torch.tensor(unigram_logprobs(counts)), max_seq_len=8).eval()

    full = SequenceBatch(torch.tensor([[0, 1, 2], [1, 0, 0]]), None)
    mask = torch.tensor([[False, False, True]])
    masked = SequenceBatch(torch.tensor([[0, 0, 2]]), None, target_mask=mask)

    loss = measure_loss(model, [full, masked])

    # Targets: 1, 2 and 0, 0 of the first batch, 2 of the second.
    expected = -(math.log(0.1) + 2 * math.log(0.3) + 2 * math.log(0.6)) / 5

    assert loss["num_tokens"] == 5
    assert loss["nll_nats"] == pytest.approx(expected)
