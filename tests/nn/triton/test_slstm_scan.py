"""Tests of `moxe_plugin.nn.triton.slstm_scan`, against the loop in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, bfloat16, float16, float32
from torch.testing import assert_close

from moxe_plugin.nn.backend import (
    ScanBackend,
    TritonMissingError,
    resolve_backend,
)
from moxe_plugin.nn.slstm import SLSTMBlock
from moxe_plugin.nn.slstm_cell import SLSTMScanInputs
from moxe_plugin.nn.slstm_parameters import SLSTMState

pytest.importorskip("triton")


def run_block(
    block: SLSTMBlock,
    backend: ScanBackend,
    seqs: Tensor,
    seq_lens: Tensor | None,
    state: SLSTMState | None,
) -> list[Tensor]:
    """Return outputs, final state, and the gradients of a function of both."""
    block.backend = backend
    leaves = [seqs, *block.parameters(), *(() if state is None else state[1:])]
    outputs, last = block(seqs, seq_lens, state)
    assert last is not None

    if seq_lens is not None:
        valid = torch.arange(seqs.size(-2), device=seqs.device) < seq_lens.unsqueeze(-1)
        outputs = outputs * valid.unsqueeze(-1)

    results = [outputs, *last]
    directions = torch.Generator().manual_seed(3)
    loss = torch.stack(
        [
            # log_n of an empty memory is -1e30.
            (
                x.clamp(min=-1e4).float()
                * torch.randn(x.shape, generator=directions).to(x.device)
            ).sum()
            for x in results
        ]
    ).sum()

    return [*results, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize(
    ("num_experts", "num_rows", "seq_len", "head_dim", "with_lens", "with_state"),
    [
        pytest.param(2, 3, 0, 3, True, True, id="no_step"),
        pytest.param(None, 1, 1, 8, False, False, id="one_step"),
        pytest.param(None, 4, 3, 3, True, True, id="block"),
        pytest.param(2, 5, 17, 36, True, True, id="experts"),
        pytest.param(2, 18, 3, 5, True, False, id="two_programs_of_rows"),
        # In bfloat16 R stays on chip, of the first in tiles of 32 and 16.
        pytest.param(2, 9, 7, 48, True, True, id="experts_on_chip"),
        pytest.param(2, 3, 0, 16, True, True, id="no_step_on_chip"),
        pytest.param(None, 5, 6, 16, False, True, id="on_chip_without_padding"),
        pytest.param(None, 4, 3, 16, True, False, id="on_chip_from_empty"),
    ],
)
@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=str)
def test_kernels_are_the_reference_with_all_gradients(
    num_experts: int | None,
    num_rows: int,
    seq_len: int,
    head_dim: int,
    with_lens: bool,
    with_state: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    heads = 2
    experts = () if num_experts is None else (num_experts,)
    dim = heads * head_dim

    block = SLSTMBlock(dim, num_heads=heads, num_experts=num_experts)
    with torch.no_grad():
        block.recurrent_weight.normal_(std=0.3)
    block.to(device, dtype)

    def randn(*shape: int, dtype: torch.dtype = float32) -> Tensor:
        values = torch.randn(*experts, num_rows, *shape, device=device, dtype=dtype)
        return values.requires_grad_()

    seqs, seq_lens, state = randn(seq_len, dim, dtype=dtype), None, None
    if with_lens:
        seq_lens = torch.randint(seq_len + 1, (*experts, num_rows), device=device)
        seq_lens[..., 0] = 0
        seq_lens[..., -1] = seq_len
    if with_state:
        memory = [randn(heads, head_dim) for _ in range(3)]
        state = SLSTMState(randn(3, dim, dtype=dtype).detach(), *memory)

    expected = run_block(block, "torch", seqs, seq_lens, state)
    actual = run_block(block, "triton", seqs, seq_lens, state)

    # bfloat16 has 8 bits; both cells compute in float32 from the same rounded gates.
    tolerance = 1e-5 if dtype == float32 else 2e-2
    for x, y in zip(actual, expected, strict=True):
        scale = max(1.0, y[y > -1e29].abs().max().item()) if (y > -1e29).any() else 1.0
        assert_close(x, y, rtol=tolerance, atol=tolerance * scale)


def test_half_precision_inputs_give_nearly_what_float32_gives(
    device: torch.device,
) -> None:
    from moxe_plugin.nn.triton.slstm_scan import slstm_scan

    experts, heads, rows, steps, dim = 2, 2, 3, 5, 12

    def randn(*shape: int, dtype: torch.dtype = bfloat16) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    memory = [torch.randn(experts, rows, heads, dim, device=device) for _ in range(3)]
    leaves = [
        randn(experts, heads, rows, steps, 2 * dim),
        randn(experts, heads, rows, steps, 2 * dim),
        randn(experts, heads, 4, dim),
        # Triton's interpreter has no products in bfloat16.
        randn(experts, heads, dim, 4, dim, dtype=float16) * 0.3,
        *memory,
    ]
    leaves = [x.requires_grad_() for x in leaves]

    def run(convert: bool) -> list[Tensor]:
        inputs = [x.float() for x in leaves] if convert else leaves
        results = slstm_scan(SLSTMScanInputs(*inputs), None)
        loss = torch.stack([x.square().mean() for x in results]).sum()

        return [*results, *torch.autograd.grad(loss, leaves)]

    # y is rounded to 11 bits before each product with R, gradients of gates to 8.
    assert_close(run(False), run(True), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(5, float32), (16, bfloat16)], ids=["float32", "on_chip"]
)
def test_padding_gets_zeros(
    head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    from moxe_plugin.nn.triton.slstm_scan import slstm_scan

    gates = torch.randn(1, 1, 2, 4, 2 * head_dim, device=device).to(dtype)
    memory = [torch.randn(1, 2, 1, head_dim, device=device) for _ in range(3)]
    inputs = SLSTMScanInputs(
        gates,
        gates,
        torch.zeros(1, 1, 4, head_dim, device=device),
        torch.randn(1, 1, head_dim, 4, head_dim, device=device).to(dtype),
        *memory,
    )

    outputs, *last = slstm_scan(inputs, torch.tensor([[0, 2]], device=device))

    assert outputs.dtype == dtype
    assert not outputs[0, 0].any()
    assert not outputs[0, 1, 2:].any()
    assert outputs[0, 1, :2].all()
    for after, before in zip(last, memory, strict=True):
        assert_close(after[0, 0], before[0, 0], rtol=0, atol=0)


def test_small_gpus_read_the_weight_at_each_step(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    from moxe_plugin.nn.triton import slstm_scan

    weight = torch.zeros(1, 16, 4, 16, device=device, dtype=bfloat16)
    assert slstm_scan.runs_on_chip(weight)
    assert not slstm_scan.runs_on_chip(weight.float())

    monkeypatch.setattr(slstm_scan, "has_shared_memory", lambda _: False)
    assert not slstm_scan.runs_on_chip(weight)


@pytest.mark.parametrize("gate", [-1e4, -80.0, 80.0, 1e4])
def test_kernels_are_finite_at_extreme_gates(gate: float, device: torch.device) -> None:
    block = SLSTMBlock(16, num_heads=2, backend="triton").to(device)
    with torch.no_grad():
        block.gate_bias[:, 0] = gate
        block.gate_bias[0, 1] = -gate

    seqs = torch.randn(2, 3, 16, device=device, requires_grad=True)
    outputs, _ = block(seqs)
    outputs.square().sum().backward()

    for tensor in (outputs, seqs.grad, *(p.grad for p in block.parameters())):
        assert tensor is not None
        assert tensor.isfinite().all()


def test_triton_refuses_what_it_cannot_run(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="float64"):
        resolve_backend("triton", torch.zeros(1, dtype=torch.float64, device=device))
    with pytest.raises(ValueError, match="'triton' with a tensor on 'meta'"):
        resolve_backend("triton", torch.zeros(1, device="meta"))

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="'triton' with a tensor on 'cpu'"):
        resolve_backend("triton", torch.zeros(1))

    monkeypatch.setattr("moxe_plugin.nn.backend._has_triton", lambda: False)
    with pytest.raises(TritonMissingError, match="no package triton"):
        resolve_backend("triton", torch.zeros(1))
