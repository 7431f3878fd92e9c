"""Draws configurations and batches of MoxE: the valid ones run, the others are told."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from fairseq2.nn import BatchLayout
from fairseq2.utils.validation import StandardObjectValidator, ValidationError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moxe_plugin.models.clm import LossTerms
from moxe_plugin.models.moxe import MoxEConfig, MoxELM, create_moxe_model
from tests.common import assert_close

pytestmark = pytest.mark.usefixtures("fairseq2_setup")

_VOCAB_SIZE = 23


def _settings(num_examples: int) -> settings:
    # What a test computes does not depend on the machine's load; no example is kept.
    return settings(
        deadline=None,
        database=None,
        derandomize=True,
        max_examples=num_examples,
        suppress_health_check=[HealthCheck.too_slow],
    )


_scales = st.sampled_from([0.0, 1e-3, 0.3, 2.0])


@st.composite
def _configs(draw: st.DrawFn) -> MoxEConfig:
    num_experts = draw(st.integers(2, 6))
    router: Literal["difficulty", "standard"] = draw(
        st.sampled_from(["difficulty", "standard"])
    )

    # Both groups must have an expert for a difficulty to choose between.
    margin = 1 if router == "difficulty" else 0
    groups = st.integers(margin, num_experts - margin)

    if num_experts % 2 == 0:
        num_mlstm_experts = draw(st.none() | groups)
    else:
        num_mlstm_experts = draw(groups)

    return MoxEConfig(
        vocab_size=_VOCAB_SIZE,
        pad_idx=draw(st.none() | st.integers(0, _VOCAB_SIZE - 1)),
        max_seq_len=16,
        model_dim=16,
        num_layers=draw(st.integers(1, 2)),
        num_heads=draw(st.sampled_from([1, 2, 4])),
        mixer_blocks=draw(
            st.lists(st.sampled_from(["slstm", "mlstm"]), min_size=1, max_size=2)
        ),
        experts=draw(st.sampled_from(["xlstm", "ffn"])),
        expert_state=draw(st.sampled_from(["subsequence", "token", "dense"])),
        num_experts=num_experts,
        num_mlstm_experts=num_mlstm_experts,
        top_k=draw(st.integers(1, num_experts)),
        expert_selection=draw(
            st.sampled_from(["top_k", "dynamic", "global_workspace", "loss_free"])
        ),
        max_top_k=draw(st.none() | st.integers(1, num_experts)),
        dynamic_threshold=draw(st.sampled_from([0.1, 0.4, 1.0])),
        workspace_threshold=draw(st.sampled_from([0.0, 0.9, 1.0])),
        workspace_at_inference=draw(st.booleans()),
        router=router,
        modulation=draw(st.sampled_from(["standard", "masked", "proportional"])),
        difficulty_bias_scale=draw(_scales),
        difficulty_threshold=draw(st.sampled_from([0.0, 0.5, 1.0])),
        router_bias=draw(st.booleans()),
        qkv_block_size=draw(st.sampled_from([4, 8])),
        conv_kernel_size=draw(st.integers(1, 5)),
        mlstm_proj_factor=draw(st.sampled_from([1.0, 2.0])),
        final_norm=draw(st.booleans()),
        difficulty_loss_scale=draw(_scales),
        group_loss_scale=draw(_scales),
        router_z_loss_scale=draw(_scales),
        load_balance_loss_scale=draw(_scales),
        group_loss=draw(st.sampled_from(["kl", "squared_difference", "bounded", "js"])),
        load_balance_loss=draw(st.sampled_from(["switch", "squared"])),
        router_z_loss_logits=draw(st.sampled_from(["biased", "unbiased"])),
        detach_entropy_target=draw(st.booleans()),
    )


def _create(config: MoxEConfig, dtype: torch.dtype) -> MoxELM:
    torch.manual_seed(3)

    return create_moxe_model(config).to(dtype)


@_settings(40)
@given(config=_configs(), seq_lens=st.lists(st.integers(1, 7), min_size=1, max_size=3))
def test_valid_configuration_trains(config: MoxEConfig, seq_lens: list[int]) -> None:
    StandardObjectValidator().validate(config)

    model = _create(config, torch.float32).train()

    shape = (len(seq_lens), max(seq_lens))
    seqs, targets = (torch.randint(0, _VOCAB_SIZE, shape) for _ in range(2))

    terms = model(
        seqs, BatchLayout.of(seqs, seq_lens), targets=targets, return_terms=True
    )
    assert isinstance(terms, LossTerms)

    terms.aggregate.backward()

    assert terms.aggregate.isfinite()

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


_NOT_A_COUNT = st.integers(-5, 0)
_NOT_A_SCALE = st.sampled_from([-1.0, -1e-9, math.nan, math.inf, -math.inf])
_NOT_A_FACTOR = st.sampled_from([0.0, -1.0, math.nan, math.inf, 1e308])
_NOT_A_SHARE = st.sampled_from([-0.1, 1.1, math.nan, math.inf])
_NO_NAME = st.text(max_size=4).map(lambda text: text + "?")

_WRONG: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(
        [
            *("vocab_size", "max_seq_len", "model_dim", "num_layers", "num_heads"),
            *("num_experts", "top_k", "max_top_k", "qkv_block_size"),
            "conv_kernel_size",
        ],
        _NOT_A_COUNT,
    ),
    **dict.fromkeys(
        [
            *("difficulty_bias_scale", "difficulty_loss_scale", "group_loss_scale"),
            *("router_z_loss_scale", "load_balance_loss_scale", "load_bias_rate"),
            "dynamic_loss_scale",
        ],
        _NOT_A_SCALE,
    ),
    **dict.fromkeys(
        ["mlstm_proj_factor", "slstm_ffn_proj_factor", "expert_ffn_proj_factor"],
        _NOT_A_FACTOR,
    ),
    **dict.fromkeys(
        ["dynamic_threshold", "workspace_threshold", "difficulty_threshold"],
        _NOT_A_SHARE,
    ),
    **dict.fromkeys(
        [
            *("experts", "expert_state", "expert_selection", "router", "modulation"),
            *("group_loss", "load_balance_loss", "router_z_loss_logits", "backend"),
        ],
        _NO_NAME,
    ),
    "pad_idx": st.sampled_from([-1, _VOCAB_SIZE, 10**6]),
    "mixer_blocks": st.just([]) | st.lists(_NO_NAME, min_size=1, max_size=2),
    "num_mlstm_experts": st.sampled_from([-1, 7, 100]),
}


@_settings(150)
@given(config=_configs(), data=st.data())
def test_invalid_field_is_named_and_nothing_else_happens(
    config: MoxEConfig, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(_WRONG)))

    setattr(config, name, data.draw(_WRONG[name]))

    with pytest.raises(ValidationError) as exc_info:
        create_moxe_model(config)

    assert f"`{name}`" in str(exc_info.value)


@_settings(30)
@given(
    config=_configs(),
    seq_lens=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    num_padding=st.integers(0, 3),
)
def test_padded_packed_and_single_sequences_agree(
    config: MoxEConfig, seq_lens: list[int], num_padding: int
) -> None:
    model = _create(config, torch.float64).eval()

    seqs = [torch.randint(0, _VOCAB_SIZE, (length,)) for length in seq_lens]

    expected = [_logits(model, seq[None], [len(seq)])[0] for seq in seqs]

    padded = torch.randint(0, _VOCAB_SIZE, (len(seqs), max(seq_lens) + num_padding))
    for row, seq in zip(padded, seqs, strict=True):
        row[: len(seq)] = seq

    logits = _logits(model, padded, seq_lens)

    for row, seq_logits in zip(logits, expected, strict=True):
        assert_close(row[: len(seq_logits)], seq_logits, rtol=1e-9, atol=1e-11)

    packed = torch.cat([*seqs, torch.randint(0, _VOCAB_SIZE, (num_padding,))])
    layout = BatchLayout.of(packed, seq_lens, packed=True)

    packed_logits = model(packed, layout)
    assert isinstance(packed_logits, Tensor)

    assert_close(
        packed_logits[: sum(seq_lens)], torch.cat(expected), rtol=1e-9, atol=1e-11
    )


@_settings(20)
@given(
    config=_configs(),
    seq_lens=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    num_padding=st.integers(1, 4),
)
def test_padding_changes_neither_loss_nor_gradients(
    config: MoxEConfig, seq_lens: list[int], num_padding: int
) -> None:
    shape = (len(seq_lens), max(seq_lens))
    seqs, targets = (torch.randint(0, _VOCAB_SIZE, shape) for _ in range(2))

    def run(width: int) -> tuple[Tensor, list[Tensor | None]]:
        # Training draws nothing: two models with the same seed are the same.
        model = _create(config, torch.float64).train()

        more = torch.randint(0, _VOCAB_SIZE, (len(seq_lens), width))
        ids, labels = (torch.cat([t, more], dim=1) for t in (seqs, targets))
        mask = torch.arange(ids.size(1)) < torch.tensor(seq_lens)[:, None]

        loss = model(
            ids,
            BatchLayout.of(ids, seq_lens),
            targets=labels,
            target_mask=mask,
        )
        assert isinstance(loss, Tensor)
        loss.backward()

        return loss.detach(), [p.grad for p in model.parameters()]

    loss, gradients = run(0)
    padded_loss, padded_gradients = run(num_padding)

    assert_close(padded_loss, loss, rtol=1e-9, atol=1e-11)

    for gradient, expected in zip(padded_gradients, gradients, strict=True):
        assert (gradient is None) == (expected is None)

        if gradient is not None and expected is not None:
            assert_close(gradient, expected, rtol=1e-7, atol=1e-10)


def _logits(model: MoxELM, seqs: Tensor, seq_lens: list[int]) -> Tensor:
    logits = model(seqs, BatchLayout.of(seqs, seq_lens))
    assert isinstance(logits, Tensor)

    return logits
