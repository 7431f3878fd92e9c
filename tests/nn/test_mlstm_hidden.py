"""Tests of `moxe_plugin.nn.mlstm_hidden`, through the block that uses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, tensor
from torch.autograd import grad

from moxe_plugin.nn import mlstm_branch
from moxe_plugin.nn.backend import ScanBackend
from moxe_plugin.nn.mlstm import MLSTMBlock
from moxe_plugin.nn.mlstm_hidden import mlstm_hidden_rows
from moxe_plugin.nn.native.library import why_not_loaded
from moxe_plugin.nn.products import why_torch

pytestmark = pytest.mark.skipif(
    why_torch() is not None or why_not_loaded("mlstm_parallel") is not None,
    reason=f"no C++ here: {why_torch() or why_not_loaded('mlstm_parallel')}",
)


def make_block(num_experts: int | None) -> MLSTMBlock:
    torch.manual_seed(1)
    block = MLSTMBlock(32, num_heads=2, num_experts=num_experts, backend="auto")
    for parameter in (block.input_gate_weight, block.forget_gate_weight, block.skip):
        torch.nn.init.normal_(parameter, std=0.2)

    return block


def differentiate(
    block: MLSTMBlock, seqs: Tensor, seq_lens: Tensor | None, backend: ScanBackend
) -> list[Tensor]:
    block.backend = backend
    outputs, _ = block(seqs, seq_lens, return_state=False)
    if seq_lens is not None:
        positions = torch.arange(seqs.size(-2))
        outputs = outputs[positions < seq_lens.unsqueeze(-1)]
    upstream = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))

    return [outputs, *grad(outputs, [seqs, *block.parameters()], upstream)]


@pytest.mark.parametrize(
    ("num_experts", "lens"),
    [
        pytest.param(None, None, id="single"),
        pytest.param(None, [70, 3], id="single-padded"),
        pytest.param(3, None, id="stacked"),
        pytest.param(3, [[70, 1], [0, 0], [0, 33]], id="ragged-idle"),
        # Beyond two heads' widths and a chunk.
        pytest.param(2, [[300, 0], [20, 290]], id="chunkwise"),
    ],
)
def test_block_and_gradients_are_those_of_torch(
    num_experts: int | None,
    lens: list[int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_calls = 0

    def count(*args: Any) -> Tensor:
        nonlocal num_calls
        num_calls += 1

        return mlstm_hidden_rows(*args)

    monkeypatch.setattr(mlstm_branch, "mlstm_hidden_rows", count)
    block = make_block(num_experts)
    seq_lens = None if lens is None else tensor(lens)
    seq_len = 70 if seq_lens is None else int(seq_lens.max())
    lead = (2,) if num_experts is None else (num_experts, 2)
    seqs = torch.randn(*lead, seq_len, 32, requires_grad=True)

    actual = differentiate(block, seqs, seq_lens, "auto")
    assert num_calls == 1
    expected = differentiate(block, seqs, seq_lens, "torch")

    assert num_calls == 1
    for x, y in zip(actual, expected, strict=True):
        assert (x - y).norm() <= 2e-5 * y.norm()


def test_sizes_that_cpp_is_not_made_for_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        mlstm_branch, "mlstm_hidden_rows", lambda *_: pytest.fail("in one function")
    )
    torch.manual_seed(1)
    block = MLSTMBlock(32, num_heads=2, qkv_block_size=16)
    seqs = torch.randn(2, 9, 32, requires_grad=True)

    actual = differentiate(block, seqs, None, "auto")
    expected = differentiate(block, seqs, None, "torch")

    for x, y in zip(actual, expected, strict=True):
        assert (x - y).norm() <= 2e-5 * y.norm()


def test_of_no_row_all_gradients_are_zero() -> None:
    block = make_block(3)
    seqs = torch.randn(3, 2, 4, 32, requires_grad=True)
    seq_lens = torch.zeros(3, 2, dtype=torch.int64)

    _, *grads = differentiate(block, seqs, seq_lens, "auto")

    assert all((x == 0).all() for x in grads)


@pytest.mark.parametrize("name", ["q_proj", "v_proj"])
def test_weights_may_lie_transposed(name: str) -> None:
    block = make_block(None)
    seqs = torch.randn(2, 9, 32, requires_grad=True)
    weight = getattr(block, name).detach()
    setattr(block, name, torch.nn.Parameter(weight.mT.contiguous().mT))

    actual = differentiate(block, seqs, None, "auto")
    expected = differentiate(block, seqs, None, "torch")

    for x, y in zip(actual, expected, strict=True):
        assert (x - y).norm() <= 2e-5 * y.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_gates_of_another_type_are_not_read_as_float32(dtype: torch.dtype) -> None:
    block = make_block(None)
    seqs = torch.randn(2, 9, 32)
    expected, _ = block(seqs, return_state=False)
    for bias in (block.input_gate_bias, block.forget_gate_bias):
        bias.data = bias.data.to(dtype)

    actual, _ = block(seqs, return_state=False)

    assert (actual - expected).norm() <= 1e-2 * expected.norm()


def test_frozen_weights_get_no_gradient() -> None:
    block = make_block(None)
    block.q_proj.requires_grad = False

    block(torch.randn(2, 9, 32), return_state=False)[0].sum().backward()

    assert block.q_proj.grad is None
    assert block.k_proj.grad is not None
    assert block.k_proj.grad.abs().sum() > 0


def test_with_a_state_the_cell_runs_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("it has no memory")

    block = make_block(None)
    seqs = torch.randn(2, 5, 32)
    expected, _ = block(seqs, return_state=False)
    monkeypatch.setattr(mlstm_branch, "mlstm_hidden_rows", refuse)

    actual, state = block(seqs)

    assert state is not None
    assert (actual - expected).norm() < 1e-5 * expected.norm()
