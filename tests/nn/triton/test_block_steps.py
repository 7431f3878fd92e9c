"""Tests of `moxe_plugin.nn.triton.block_steps`, against the blocks in torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

pytest.importorskip("triton")

from moxe_plugin.nn.backend import MAX_STEP_SEQS, ScanBackend
from moxe_plugin.nn.expert_states import ExpertsState
from moxe_plugin.nn.experts import SparseExperts
from moxe_plugin.nn.mlstm import MLSTMBlock
from moxe_plugin.nn.routing import Routing
from moxe_plugin.nn.slstm import SLSTMBlock
from moxe_plugin.nn.states import take_state
from moxe_plugin.nn.triton import block_steps
from moxe_plugin.nn.triton.block_steps import sum_experts
from moxe_plugin.nn.triton.step_units import StepUnits

Kind = Literal["mlstm", "slstm"]

NUM_SEQS = 3

KINDS: list[Kind] = ["mlstm", "slstm"]

BACKENDS: list[ScanBackend] = ["torch", "triton"]

kinds = pytest.mark.parametrize("kind", KINDS)

# Heads of 48 and 12 channels, which are no power of two, and of 96 and 72; three heads.
sizes = pytest.mark.parametrize(
    ("model_dim", "num_heads", "taps"),
    [(48, 4, 4), (48, 3, 2), (144, 2, 4)],
    ids=["narrow", "few_taps", "wide"],
)


def make_block(
    kind: Kind,
    device: torch.device,
    *,
    model_dim: int = 48,
    num_heads: int = 4,
    num_experts: int | None = None,
    dtype: torch.dtype = torch.float32,
    taps: int = 4,
) -> MLSTMBlock | SLSTMBlock:
    block: MLSTMBlock | SLSTMBlock

    if kind == "mlstm":
        block = MLSTMBlock(
            model_dim,
            num_heads=num_heads,
            num_experts=num_experts,
            conv_kernel_size=taps,
            qkv_block_size=24,
            proj_factor=192 / model_dim,
        )
    else:
        block = SLSTMBlock(
            model_dim,
            num_heads=num_heads,
            num_experts=num_experts,
            conv_kernel_size=taps,
        )

    with torch.no_grad():
        for param in block.parameters():
            param.add_(torch.randn_like(param), alpha=0.2)

    return block.to(device, dtype)


def read_text(block: MLSTMBlock | SLSTMBlock, device: torch.device) -> Any:
    """Let a block, or all experts, read a text in torch; return the state."""
    block.backend = "torch"
    leading = () if block.num_experts is None else (block.num_experts,)
    weight = next(block.parameters())

    with torch.no_grad():
        seqs = torch.randn(*leading, NUM_SEQS, 6, block.model_dim, device=device)
        _, state = block(seqs.to(weight.dtype))

    return take_state(state, reuse=False)


def draw_tokens(block: MLSTMBlock | SLSTMBlock, device: torch.device) -> Tensor:
    weight = next(block.parameters())

    return torch.randn(NUM_SEQS, block.model_dim, device=device).to(weight.dtype)


@kinds
@sizes
def test_a_step_of_a_block_is_that_in_torch(
    kind: Kind,
    model_dim: int,
    num_heads: int,
    taps: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = make_block(
        kind, device, model_dim=model_dim, num_heads=num_heads, taps=taps
    )
    # Weights and memories are wider than a tile.
    monkeypatch.setattr(block_steps, "_BLOCK_IN", 64)
    monkeypatch.setattr(block_steps, "_BLOCK_MEMORY", 32)
    monkeypatch.setattr(block_steps, "_BLOCK_HEAD_IN", 32)
    before = read_text(block, device)
    tokens = draw_tokens(block, device)

    with torch.no_grad():
        expected, expected_state = block(tokens[:, None], None, before)

        block.backend = "triton"
        copies = [x.clone() for x in before]
        actual, state = block(tokens[:, None], None, before)

        assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert_close(state, expected_state, rtol=1e-5, atol=1e-5)
        for x, copy in zip(before, copies, strict=True):
            assert torch.equal(x, copy)

        output, after = block(tokens[:, None], None, before, return_state=False)
        assert_close(output, actual)
        assert after is None

        _, reused = block(tokens[:, None], None, before, reuse_state=True)

        assert_close(reused, state)
        for x, y in zip(reused, before, strict=True):
            assert x is y


@kinds
def test_kernels_are_for_steps_of_few_sequences(
    kind: Kind, device: torch.device
) -> None:
    block = make_block(kind, device)
    block.backend = "triton"
    seqs = torch.zeros(MAX_STEP_SEQS, 1, 48, device=device)

    assert not block.steps_units(seqs)

    with torch.no_grad():
        assert block.steps_units(seqs)
        assert not block.steps_units(seqs.expand(-1, 2, -1))
        assert not block.steps_units(torch.zeros(MAX_STEP_SEQS + 1, 1, 48))

        # A convolution of the present alone has no window.
        block = make_block(kind, device, taps=1)
        block.backend = "triton"
        assert not block.steps_units(seqs)


@kinds
def test_a_text_begins_with_an_empty_memory(kind: Kind, device: torch.device) -> None:
    block = make_block(kind, device)
    tokens = draw_tokens(block, device)
    results = []

    with torch.no_grad():
        for backend in BACKENDS:
            block.backend = backend
            results.append(block(tokens[:, None]))

    assert_close(*results, rtol=1e-4, atol=1e-4)


@kinds
def test_bfloat16_is_rounded_no_more_than_in_torch(
    kind: Kind, device: torch.device
) -> None:
    block = make_block(kind, device, dtype=torch.bfloat16)
    before = read_text(block, device)
    tokens = draw_tokens(block, device)
    exact = make_block(kind, device)
    exact.load_state_dict(block.state_dict())
    exact.backend = "torch"

    with torch.no_grad():
        wide = type(before)(*(x.float() for x in before))
        expected, expected_state = exact(tokens[:, None].float(), None, wide)
        in_torch, _ = block(tokens[:, None], None, before)

        block.backend = "triton"
        actual, state = block(tokens[:, None], None, before)

    assert actual.dtype == torch.bfloat16
    error, error_in_torch = (
        (x.float() - expected).norm() / expected.norm() for x in (actual, in_torch)
    )
    assert error < min(0.005, error_in_torch)
    for x, y in zip(state, expected_state, strict=True):
        assert_close(x.float(), y, rtol=0.01, atol=0.01)


@kinds
def test_only_chosen_experts_of_the_bank_are_touched(
    kind: Kind, device: torch.device
) -> None:
    block = make_block(kind, device, num_experts=3)
    before = read_text(block, device)
    tokens = draw_tokens(block, device)

    # The bank's experts are 2, 3 and 4.
    experts = tensor([[4, 2], [1, -1], [9, 3]], device=device)
    units = StepUnits(tokens, experts.flatten(), 2, 3, 2)

    with torch.no_grad():
        seqs = tokens[None, :, None].expand(3, -1, -1, -1)
        expected, expected_state = block(seqs, None, before)

        state = take_state(before, reuse=False)
        out = torch.full((6, block.model_dim), 7.0, device=device)
        block.step_units(units, state, out)

    chosen = {(0, 2): 0, (0, 0): 1, (2, 1): 5}  # (token, expert): unit
    for token in range(NUM_SEQS):
        for expert in range(3):
            after = expected_state if (token, expert) in chosen else before
            for x, y in zip(state, after, strict=True):
                assert_close(x[expert, token], y[expert, token], rtol=1e-5, atol=1e-5)

    for unit in range(6):
        wanted = torch.full_like(out[unit], 7.0)
        for (token, expert), its_unit in chosen.items():
            if its_unit == unit:
                wanted = expected[expert, token, 0]
        assert_close(out[unit], wanted, rtol=1e-4, atol=1e-4)


@kinds
def test_a_state_that_cannot_be_written_is_refused(
    kind: Kind, device: torch.device
) -> None:
    block = make_block(kind, device)
    first, *others = read_text(block, device)
    tokens = draw_tokens(block, device)

    transposed = first.mT.contiguous().mT
    state: Any = type(block.initial_state(1))(transposed, *others)

    with pytest.raises(ValueError, match=r"^`state` must have contiguous tensors"):
        block.step_units(StepUnits(tokens), state, torch.empty_like(tokens))


def test_outputs_of_experts_are_summed(device: torch.device) -> None:
    # The last place of the second token is empty: what stands there does not count.
    experts = tensor([0, 2, 1, -1], device=device)
    outputs = torch.randn(4, 200, device=device)
    outputs[3] = float("nan")
    weights = tensor([[0.25, 0.75], [1.0, 5.0]], device=device)
    out = torch.empty(2, 200, device=device)

    sum_experts(outputs, weights, experts, 3, out)

    assert_close(out[0], 0.25 * outputs[0] + 0.75 * outputs[1])
    assert_close(out[1], outputs[2])


def make_routing(experts: Sequence[Sequence[int]], device: torch.device) -> Routing:
    indices = tensor(experts, device=device)
    weights = torch.rand(indices.shape, device=device)
    unused = torch.empty(0)

    return Routing(unused, unused, unused, unused, None, indices, weights)


@pytest.mark.parametrize("split", [(2, 3), (5, 0), (0, 5)])
def test_steps_of_experts_are_those_in_torch(
    split: tuple[int, int], device: torch.device
) -> None:
    mlstm, slstm = (
        make_block(kind, device, num_experts=size) if size else None
        for kind, size in zip(KINDS, split, strict=True)
    )
    experts = SparseExperts(5, mlstm=mlstm, slstm=slstm, steps="device")
    steps = [
        make_routing([[0, 4], [2, -1], [3, 1]], device),
        make_routing([[4, 0], [2, 3], [-1, -1]], device),
        make_routing([[1, 2], [0, 1], [4, 2]], device),
    ]
    seqs = torch.randn(len(steps), NUM_SEQS, 1, 48, device=device)
    results = []

    for backend in BACKENDS:
        for bank in (mlstm, slstm):
            if bank is not None:
                bank.backend = backend

        state: ExpertsState | None = None
        outputs = []
        with torch.no_grad():
            for token, routing in zip(seqs, steps, strict=True):
                output, state = experts(
                    token, routing, None, state, reuse_state=backend == "triton"
                )
                outputs.append(output)

        results.append((torch.stack(outputs), state))

    assert_close(*results, rtol=1e-4, atol=1e-4)
