"""Tests of `moxe_plugin.nn.triton.mlstm_rows`, against the cell in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, bfloat16, float32
from torch.testing import assert_close

from moxe_plugin.nn.mlstm_cell import mlstm_parallel
from moxe_plugin.nn.ragged import RaggedRows, ragged_rows

pytest.importorskip("triton")


def reference(
    qkv: Tensor, gates: Tensor, seq_lens: list[list[int]], num_heads: int
) -> Tensor:
    """Run the cell in torch, segment by segment."""
    outputs = []
    flat = [length for lens in seq_lens for length in lens]
    for seq, gate in zip(qkv.split(flat), gates.split(flat), strict=True):
        # (S,3I) -> 3 x (H,S,D)
        q, k, v = seq.unflatten(1, (3, num_heads, -1)).permute(1, 2, 0, 3)
        i, f = gate.unflatten(1, (2, num_heads)).permute(1, 2, 0)
        h, _ = mlstm_parallel(q, k, v, i, f, return_memory=False)
        outputs.append(h.transpose(0, 1).flatten(1))

    return torch.cat(outputs)


def run(
    qkv: Tensor, gates: Tensor, rows: RaggedRows, num_heads: int, direction: Tensor
) -> list[Tensor]:
    """Return the outputs of the kernels, and both gradients."""
    from moxe_plugin.nn.triton.mlstm_rows import mlstm_rows

    q, k, v = qkv.chunk(3, dim=1)
    h = mlstm_rows(q, k, v, gates, rows, num_heads)

    return [h, *torch.autograd.grad(h, [qkv, gates], direction.to(h.dtype))]


def random_inputs(
    num_rows: int, num_heads: int, head_dim: int, device: torch.device
) -> list[Tensor]:
    """Return q, k and v in one buffer, gates, and a gradient of the outputs."""
    generator = torch.Generator().manual_seed(2)

    def randn(width: int) -> Tensor:
        return torch.randn(num_rows, width, generator=generator).to(device)

    gates = randn(2 * num_heads)
    # Open forget gates, as blocks begin with
    gates[:, num_heads:] += 3

    return [randn(3 * num_heads * head_dim), gates, randn(num_heads * head_dim)]


@pytest.mark.parametrize(
    ("seq_lens", "num_heads", "head_dim"),
    [
        pytest.param([[1]], 1, 16, id="one_step"),
        pytest.param([[5, 0, 1], [0, 0, 0], [33, 32, 3]], 2, 48, id="experts"),
        pytest.param([[70, 128, 64]], 2, 32, id="blocks"),
        pytest.param([[70, 129]], 1, 32, id="blocks_of_long"),
        pytest.param([[0, 20], [9, 0]], 1, 80, id="masked_tile"),
        pytest.param([[300]], 1, 16, id="long"),
    ],
)
@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=str)
def test_kernels_are_the_reference_with_all_gradients(
    seq_lens: list[list[int]],
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    rows = ragged_rows(seq_lens, device)
    qkv, gates, direction = random_inputs(rows.num_rows, num_heads, head_dim, device)
    qkv = qkv.to(dtype).requires_grad_()
    gates.requires_grad_()

    actual = run(qkv, gates, rows, num_heads, direction)
    h = reference(qkv.double(), gates.double(), seq_lens, num_heads)
    grads = torch.autograd.grad(h, [qkv, gates], direction.to(dtype).double())

    # A small denominator makes large outputs; an error is small beside these. Float32
    # had 2.6e-5 on an H200.
    tolerance = 4e-5 if dtype == float32 else 2e-2
    for x, y in zip(actual, [h, *grads], strict=True):
        atol = tolerance * y.abs().max().item()
        assert_close(x.double(), y.double(), rtol=tolerance, atol=atol)


@pytest.mark.parametrize(("length", "block_s"), [(128, 64), (129, 32)])
def test_short_segments_have_larger_blocks(length: int, block_s: int) -> None:
    from moxe_plugin.nn.triton.mlstm_rows_tilings import find_options

    rows = ragged_rows([[length, 3]], torch.device("cpu"))

    for kernel in ("forward", "query_grad"):
        own, options = find_options(kernel, bfloat16, 320, rows)
        assert (own, options["BLOCK_S"]) == (64, block_s)


def test_gradients_are_written_between_others(device: torch.device) -> None:
    from moxe_plugin.nn.triton.mlstm_rows import (
        mlstm_rows_backward,
        mlstm_rows_forward,
    )

    num_heads, head_dim = 2, 16
    width = num_heads * head_dim
    rows = ragged_rows([[3, 18]], device)
    qkv, gates, direction = random_inputs(rows.num_rows, num_heads, head_dim, device)
    expected = run(
        *(qkv.requires_grad_(), gates.requires_grad_(), rows, num_heads, direction)
    )

    with torch.no_grad():
        q, k, v = qkv.chunk(3, dim=1)
        # Rows of gates and outputs are farther apart than they are wide, too.
        wide_gates = torch.cat([gates, gates], dim=1)[:, : 2 * num_heads]
        grad_h = torch.cat([direction, direction], dim=1)[:, :width]
        h, small = mlstm_rows_forward(q, k, v, wide_gates, rows, num_heads)
        grad = torch.full((rows.num_rows, 4 * width), 7.0, device=device)
        grads = grad.split(width, dim=1)
        grad_gates = mlstm_rows_backward(
            *(q, k, v, wide_gates, h, small, grad_h, *grads[:3], rows)
        )

    for x, y in zip([h, grad[:, : 3 * width], grad_gates], expected, strict=True):
        assert_close(x, y, rtol=0, atol=0)
    assert (grads[3] == 7).all()


def test_no_rows_are_no_work(device: torch.device) -> None:
    rows = ragged_rows([[0, 0], [0, 0]], device)
    qkv, gates, direction = random_inputs(0, 2, 16, device)

    h, grad_qkv, grad_gates = run(
        *(qkv.requires_grad_(), gates.requires_grad_(), rows, 2, direction)
    )

    assert h.shape == (0, 32)
    assert grad_qkv.shape == (0, 96)
    assert grad_gates.shape == (0, 4)


@pytest.mark.parametrize("gate", [-1e4, -80.0, 80.0, 1e4])
def test_kernels_are_finite_at_extreme_gates(gate: float, device: torch.device) -> None:
    rows = ragged_rows([[20]], device)
    qkv, gates, direction = random_inputs(20, 2, 16, device)
    gates[:, 0] = gate
    gates[:, 1] = -gate
    gates[:, 2] = -gate
    gates[10:, 3] = gate

    for x in run(qkv.requires_grad_(), gates.requires_grad_(), rows, 2, direction):
        assert x.isfinite().all()


def test_what_kernels_cannot_run_is_refused(device: torch.device) -> None:
    from moxe_plugin.nn.triton.mlstm_rows import mlstm_rows

    rows = ragged_rows([[2]], device)
    qkv, gates, _ = random_inputs(2, 2, 16, device)

    q, k, v = qkv.chunk(3, dim=1)
    with pytest.raises(ValueError, match="float64"):
        mlstm_rows(q.double(), k.double(), v.double(), gates, rows, 2)
    with pytest.raises(ValueError, match="multiple of 16"):
        mlstm_rows(q, k, v, gates, rows, 4)
