"""Tests of `moxe_plugin.nn.mlstm_hidden`, through the block that uses it."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, bfloat16, float64, tensor
from torch.autograd import grad

from moxe_plugin.nn import mlstm_branch
from moxe_plugin.nn.backend import ScanBackend
from moxe_plugin.nn.mlstm import MLSTMBlock
from moxe_plugin.nn.mlstm_hidden import mlstm_hidden_rows
from moxe_plugin.nn.mlstm_recurrence import follow_each_other
from moxe_plugin.nn.native.library import why_not_loaded
from moxe_plugin.nn.products import rounds_to_bfloat16, why_torch
from moxe_plugin.nn.rows import find_rows
from moxe_plugin.nn.stacked import project_head_wise

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


def differentiate_hidden(
    block: MLSTMBlock, inputs: list[Tensor], lens: Tensor, upstream: Tensor
) -> list[Tensor]:
    rows = find_rows(lens, int(lens.max()))
    conv_input, convolved = inputs
    hidden = block.hidden_natively(
        conv_input, convolved, rows.counts, follow_each_other(rows.seq_lens)
    )
    # In float64, it is torch's.
    assert (hidden is None) == (inputs[0].dtype == float64)
    if hidden is None:
        cell_inputs = block.cell_inputs(conv_input, convolved, rows.counts)
        hidden, _ = block.recurrence.apply_to_rows(
            cell_inputs, rows, None, return_memory=False
        )
    wanted = [*inputs, *(x for x in cell_parameters(block) if x.requires_grad)]

    return [hidden, *grad(hidden, wanted, upstream.to(hidden.dtype))]


def cell_parameters(block: MLSTMBlock) -> list[Tensor]:
    return [
        *(block.q_proj, block.k_proj, block.v_proj),
        *(block.input_gate_weight, block.forget_gate_weight),
        *(block.input_gate_bias, block.forget_gate_bias),
    ]


@pytest.mark.skipif(
    why_torch() is not None or not rounds_to_bfloat16(),
    reason="no products of bfloat16 in C++ here",
)
@pytest.mark.parametrize(
    "lens",
    [
        pytest.param([[70, 4], [0, 0], [0, 1], [14, 15]], id="parallel"),
        pytest.param([[300, 0], [20, 291]], id="chunkwise"),
    ],
)
def test_hidden_and_gradients_of_bfloat16_are_those_of_float64(
    lens: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def project_and_round(*args: Any) -> Tensor:
        projected = project_head_wise(*args)

        return projected + (projected.bfloat16() - projected).detach()

    # Where a normaliser is small, a cell magnifies what its inputs are rounded by.
    monkeypatch.setattr(mlstm_branch, "project_head_wise", project_and_round)
    block = make_block(len(lens)).bfloat16()
    block.k_proj.requires_grad = False
    seq_lens = tensor(lens)
    num_rows = int(seq_lens.sum())
    # Rows of the first lie apart, as a half of what is projected up does.
    joint = torch.randn(num_rows, 2 * block.inner_dim).bfloat16()
    convolved, upstream = torch.randn(2, num_rows, block.inner_dim).bfloat16()
    inputs = [x.requires_grad_() for x in (joint[:, : block.inner_dim], convolved)]
    wide_inputs = [x.detach().double().requires_grad_() for x in inputs]
    wide_block = deepcopy(block).double()

    actual = differentiate_hidden(block, inputs, seq_lens, upstream)
    expected = differentiate_hidden(wide_block, wide_inputs, seq_lens, upstream)

    assert len(actual) == 9
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == bfloat16
        assert (x - y).norm() <= 2**-7 * y.norm()


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
