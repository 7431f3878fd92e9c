"""Tests of `moxe_plugin.nn.triton.row_norm`, against layer normalisation in torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, bfloat16, float32, float64
from torch.testing import assert_close

from moxe_plugin.nn.ragged import RaggedRows, ragged_rows

pytest.importorskip("triton")

from moxe_plugin.nn.triton.row_norm import (  # needs Triton
    norm_backward,
    norm_forward,
    scale_norm_rows,
)

EPS = 1e-5

# An expert boundary within a block of 32 rows, experts without a row, one with none of
# some sequences, and a number of rows that no tile divides
LENS = [[5, 0], [0, 0], [1, 39], [2, 30], [0, 0]]


def lay_out(lens: list[list[int]] = LENS) -> RaggedRows:
    return ragged_rows(lens, torch.device("cpu"))


def expert_of_row(rows: RaggedRows) -> Tensor:
    return rows.segment_of_row // rows.num_seqs


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def norm_reference(
    flat: Tensor,
    weight: Tensor,
    rows: RaggedRows,
    num_heads: int,
    residual: Tensor | None,
) -> Tensor:
    heads = flat.unflatten(-1, (num_heads, -1))
    normed = F.layer_norm(heads, heads.shape[-1:], eps=EPS).flatten(-2)
    out = normed * weight[expert_of_row(rows)]

    return out if residual is None else out + residual


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize(("width", "num_heads"), [(40, 1), (24, 4), (320, 2)])
def test_matches_layer_norm(width: int, num_heads: int, has_residual: bool) -> None:
    rows = lay_out()
    # Halves of a wider tensor
    wide = draw(rows.num_rows, 2 * width, seed=1) * 3 + 1
    flat = wide[:, width:].requires_grad_()
    residual = draw(rows.num_rows, 2 * width, seed=2)[:, :width].requires_grad_()
    weight = draw(rows.num_experts, width, seed=3).requires_grad_()
    grad = draw(rows.num_rows, 2 * width, seed=4)[:, :width]
    leaves = [flat, weight, *([residual] if has_residual else [])]

    out = scale_norm_rows(
        flat, weight, rows, num_heads, EPS, residual if has_residual else None
    )
    grads = torch.autograd.grad(out, leaves, grad)

    exact = [x.detach().to(float64).requires_grad_() for x in leaves]
    expected = norm_reference(
        exact[0], exact[1], rows, num_heads, exact[2] if has_residual else None
    )
    expected_grads = torch.autograd.grad(expected, exact, grad.to(float64))

    for x, y in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert_close(x, y.to(float32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flat_dtype", [float32, bfloat16])
def test_takes_bfloat16(flat_dtype: torch.dtype) -> None:
    rows = lay_out()
    flat = draw(rows.num_rows, 48, seed=1).to(flat_dtype).requires_grad_()
    weight = draw(rows.num_experts, 48, seed=2).to(bfloat16).requires_grad_()
    residual = draw(rows.num_rows, 48, seed=3).to(bfloat16).requires_grad_()
    grad = draw(rows.num_rows, 48, seed=4).to(bfloat16)
    leaves = [flat, weight, residual]

    out = scale_norm_rows(flat, weight, rows, 2, EPS, residual)
    grads = torch.autograd.grad(out, leaves, grad)

    exact = [x.detach().to(float64).requires_grad_() for x in leaves]
    expected = norm_reference(exact[0], exact[1], rows, 2, exact[2])
    expected_grads = torch.autograd.grad(expected, exact, grad.to(float64))

    assert out.dtype == scale_norm_rows(flat, weight, rows, 2, EPS).dtype == bfloat16
    # Only the results are rounded to bfloat16.
    for x, y in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert_close(x, y.to(x.dtype), rtol=2**-7, atol=1e-5)


def test_adds_the_gradient_from_elsewhere() -> None:
    rows = lay_out()
    flat, other, grad = (draw(rows.num_rows, 24, seed=x) for x in range(3))
    weight = draw(rows.num_experts, 24, seed=3)

    _, stats = norm_forward(flat, weight, rows, 1, EPS)
    args = (grad, flat, weight, stats, rows, 1)
    grad_flat, grad_weight = norm_backward(*args)
    summed, same_weight = norm_backward(*args, other_grad=other)

    assert_close(summed, grad_flat + other)
    assert torch.equal(same_weight, grad_weight)


def test_a_constant_row_stays_finite() -> None:
    rows = lay_out([[3]])
    flat = torch.full((3, 40), 1e4, requires_grad=True)
    weight = torch.ones(1, 40)

    out = scale_norm_rows(flat, weight, rows, 1, EPS)
    (grad,) = torch.autograd.grad(out, flat, draw(3, 40, seed=1))

    assert_close(out, torch.zeros(3, 40))
    assert grad.isfinite().all()


def test_no_rows_give_zero_gradients() -> None:
    rows = lay_out([[0, 0], [0, 0]])
    flat = torch.zeros(0, 40, requires_grad=True)
    weight = torch.ones(2, 40, requires_grad=True)

    out = scale_norm_rows(flat, weight, rows, 1, EPS)
    out.sum().backward()

    assert out.shape == (0, 40)
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros(2, 40))
