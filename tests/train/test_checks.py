"""Checks that unfit combinations are refused with a clear line."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fairseq2.gang import FakeGang, create_fake_gangs
from fairseq2.recipe.error import RecipeError

from moxe_plugin.models.moxe import MoxEConfig, create_moxe_model
from moxe_plugin.train.checks import check_gangs, check_seq_len, check_vocabulary
from tests.common import PAD_IDX, VOCAB_SIZE, ByteTokenizer


def _make_config() -> MoxEConfig:
    return MoxEConfig(
        vocab_size=VOCAB_SIZE,
        pad_idx=PAD_IDX,
        max_seq_len=64,
        model_dim=32,
        num_layers=1,
        num_heads=2,
        num_experts=4,
    )


def test_fitting_model_passes() -> None:
    model = create_moxe_model(_make_config())

    check_gangs(create_fake_gangs(torch.device("cpu")))
    check_vocabulary(model, ByteTokenizer())
    check_seq_len(model, 64)


def test_tensor_parallelism_is_refused() -> None:
    device = torch.device("cpu")

    gangs = replace(create_fake_gangs(device), tp=FakeGang(device, size=2))

    with pytest.raises(RecipeError, match=r"`gang\.tensor_parallel_size` must be 1"):
        check_gangs(gangs)


def test_too_small_vocabulary_is_refused() -> None:
    config = _make_config()
    config.vocab_size = 300

    with pytest.raises(RecipeError, match=r"of the tokenizer's 320 tokens.* has 300"):
        check_vocabulary(create_moxe_model(config), ByteTokenizer())


def test_other_pad_idx_is_refused() -> None:
    config = _make_config()
    config.pad_idx = None

    with pytest.raises(RecipeError, match=r"\(258\), but is None.*pad_idx=258"):
        check_vocabulary(create_moxe_model(config), ByteTokenizer())


def test_too_long_sequences_are_refused() -> None:
    model = create_moxe_model(_make_config())

    with pytest.raises(RecipeError, match=r"`max_seq_len` \(64\), but is 65 instead"):
        check_seq_len(model, 65)
