"""Tests of moxe_plugin/eval/scoring.py."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from fairseq2.models.clm import CausalLM

from moxe_plugin.eval.batching import Batching
from moxe_plugin.eval.scoring import (
    Score,
    TokenCounts,
    resolve_sharing,
    score_continuations,
)
from moxe_plugin.models.moxe.config import MoxEConfig
from tests.eval.conftest import Load
from tests.models.families import create_model

Pair = tuple[list[int], list[int]]


def score(
    model: CausalLM,
    pairs: Sequence[Pair],
    *,
    share_prefixes: bool | None,
    batch_size: int | str = 3,
    max_length: int = 64,
) -> tuple[list[Score], TokenCounts]:
    """Score pairs and count tokens."""
    scores: dict[int, Score] = {}

    def on_scored(idx: int, score: Score) -> None:
        assert idx not in scores
        scores[idx] = score

    counts = score_continuations(
        model,
        pairs,
        max_length=max_length,
        batching=Batching(batch_size=batch_size, vocab_size=320),
        on_scored=on_scored,
        share_prefixes=share_prefixes,
    )

    return [scores[idx] for idx in range(len(pairs))], counts


def make_questions() -> list[Pair]:
    """Make questions of two levels: a common instruction, and answers that overlap."""
    rng = random.Random(2)

    def tokens(size: int) -> list[int]:
        return [rng.randrange(256) for _ in range(size)]

    instruction = tokens(11)
    pairs: list[Pair] = []

    for length in (9, 14, 3):
        question = instruction + tokens(length)
        begin = tokens(10)

        answers = [tokens(1), tokens(5), begin + tokens(4), begin + tokens(7), begin]
        pairs += [(question, answer) for answer in answers]

    return [*pairs, (tokens(20), tokens(3)), ([7], tokens(6))]


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
@pytest.mark.parametrize("family", ["moxe", "xlstm"])
def test_shared_prefixes_change_no_score(
    load: Load, family: str, batch_size: int | str
) -> None:
    model, pairs = load(family).model, make_questions()

    alone, _ = score(model, pairs, share_prefixes=False, batch_size=1)
    shared, counts = score(model, pairs, share_prefixes=True, batch_size=batch_size)

    for one, other in zip(alone, shared, strict=True):
        assert other.logprob == pytest.approx(one.logprob, abs=1e-5 * -one.logprob)
        assert other.is_greedy == one.is_greedy

    assert counts.unshared == sum(
        len(seq) for seq in {(*context, *answer[:-1]) for context, answer in pairs}
    )
    assert counts.computed < counts.unshared / 2


@pytest.mark.parametrize("expert_state", ["subsequence", "token", "dense"])
def test_states_of_all_kinds_of_experts_are_shared(
    expert_state: Literal["subsequence", "token", "dense"],
) -> None:
    torch.manual_seed(2)

    def change(config: MoxEConfig) -> None:
        config.expert_state = expert_state

    model = create_model("moxe", change=change).eval()
    pairs = make_questions()

    alone, _ = score(model, pairs, share_prefixes=False)
    shared, _ = score(model, pairs, share_prefixes=True)

    for one, other in zip(alone, shared, strict=True):
        assert other.logprob == pytest.approx(one.logprob, abs=1e-6)


def test_inputs_that_were_cut_share_what_is_left(load: Load) -> None:
    model, pairs = load("xlstm").model, make_questions()

    alone, _ = score(model, pairs, share_prefixes=False, max_length=20)
    shared, counts = score(model, pairs, share_prefixes=True, max_length=20)

    assert [s.logprob for s in shared] == pytest.approx([s.logprob for s in alone])
    assert counts.computed < counts.unshared


def test_models_without_recurrent_state_share_nothing(load: Load) -> None:
    model = load("gemma2").model

    _, counts = score(model, make_questions(), share_prefixes=None)

    assert counts.computed == counts.unshared

    with pytest.raises(ValueError, match="`share_prefixes` must be false"):
        resolve_sharing(model, share_prefixes=True)


def test_rounded_states_are_shared_only_when_asked_for(load: Load) -> None:
    assert resolve_sharing(load("moxe").model, None)

    model = create_model("moxe", dtype=torch.bfloat16)

    assert not resolve_sharing(model, None)
    assert resolve_sharing(model, share_prefixes=True)
