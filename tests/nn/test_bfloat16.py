"""Tests of blocks whose parameters are bfloat16, on a CPU."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, bfloat16, float64

from moxe_plugin.nn.backend import ScanBackend
from moxe_plugin.nn.feed_forward import GatedFeedForward
from moxe_plugin.nn.mlstm import MLSTMBlock
from moxe_plugin.nn.native.library import why_not_loaded
from moxe_plugin.nn.slstm import SLSTMBlock
from moxe_plugin.nn.slstm_cell import SLSTMMemory
from moxe_plugin.nn.slstm_recurrence import GateRows, SLSTMCell
from tests.nn.bfloat16_cases import needs_bfloat16

needs_compiler = pytest.mark.skipif(
    why_not_loaded("slstm_scan") is not None,
    reason=f"no C++ here: {why_not_loaded('slstm_scan')}",
)

LENS = torch.tensor([[9, 0, 4], [3, 9, 7]])


def differentiate(
    block: MLSTMBlock | SLSTMBlock, backend: ScanBackend, dtype: torch.dtype
) -> list[Tensor]:
    """Return a block's outputs and all gradients, of the same numbers each time."""
    block = deepcopy(block).to(dtype)
    block.backend = backend

    generator = torch.Generator().manual_seed(2)
    seqs, direction = (
        torch.randn(2, 3, 9, block.model_dim, generator=generator).bfloat16().to(dtype)
        for _ in range(2)
    )
    seqs.requires_grad_()

    valid = (torch.arange(9) < LENS.unsqueeze(-1)).unsqueeze(-1)
    output = block(seqs, LENS, return_state=False)[0] * valid

    return [
        output,
        *torch.autograd.grad((output * direction).sum(), [seqs, *block.parameters()]),
    ]


@needs_compiler
@pytest.mark.parametrize("kind", ["mlstm", "slstm"])
def test_cpp_rounds_no_more_than_torch(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The mLSTM's cell takes C++ where products do, which need AVX-512.
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        monkeypatch.setattr("moxe_plugin.nn.products.why_torch", lambda: None)
    block: MLSTMBlock | SLSTMBlock
    if kind == "mlstm":
        block = MLSTMBlock(64, num_heads=2, num_experts=2)
    else:
        block = SLSTMBlock(64, num_heads=2, num_experts=2)
    with torch.no_grad():
        for param in block.parameters():
            param.add_(torch.randn_like(param), alpha=0.1)
            param.copy_(param.bfloat16())

    exact = differentiate(block, "torch", float64)
    in_torch = differentiate(block, "torch", bfloat16)
    in_cpp = differentiate(block, "native", bfloat16)

    names = ["output", "seqs", *(name for name, _ in block.named_parameters())]
    for name, x, y, z in zip(names, in_cpp, in_torch, exact, strict=True):
        assert x.dtype == bfloat16, name

        error, error_in_torch = ((w.double() - z).norm() / z.norm() for w in (x, y))
        assert error <= max(0.02, 1.2 * error_in_torch.item()), name


@needs_compiler
@needs_bfloat16
@pytest.mark.parametrize("multiplies", [True, False], ids=["kept", "widened"])
def test_cell_keeps_rows_in_bfloat16_where_cpp_multiplies_it(
    multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moxe_plugin.nn.passes.rounds_to_bfloat16", lambda: multiplies)
    gates = torch.randn(2, 6, 20, dtype=bfloat16, requires_grad=True)
    weight = torch.randn(2, 5, 4, 5, dtype=bfloat16, requires_grad=True)
    bias = torch.randn(2, 4, 5, dtype=bfloat16, requires_grad=True)
    memory = SLSTMMemory(*torch.randn(3, 2, 2, 5))

    outputs, last = SLSTMCell(bias, weight, "native").apply(
        GateRows(gates.unbind(), (2, 3), None, None), memory
    )
    grads = torch.autograd.grad(outputs.sum(), [gates, weight, bias])

    assert outputs.dtype == (bfloat16 if multiplies else torch.float32)
    assert {x.dtype for x in last} == {torch.float32}
    assert {x.dtype for x in grads} == {bfloat16}


@needs_compiler
@pytest.mark.parametrize(
    "layer",
    [
        MLSTMBlock(64, num_heads=2),
        GatedFeedForward(64, 96, up_std=0.1, down_std=0.1),
    ],
    ids=["mlstm", "feed_forward"],
)
def test_layers_are_compiled_whole(layer: MLSTMBlock | GatedFeedForward) -> None:
    layer, seqs = deepcopy(layer).bfloat16(), torch.randn(2, 9, 64).bfloat16()

    compiled = torch.compile(layer, backend="eager", fullgraph=True)

    # Of an mLSTM, the outputs are first.
    actual, expected = (
        x[0] if isinstance(x, tuple) else x for x in (compiled(seqs), layer(seqs))
    )
    error = (actual - expected).double().norm() / expected.double().norm()
    assert error < 0.05
