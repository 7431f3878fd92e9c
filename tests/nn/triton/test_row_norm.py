"""Tests of `moxe_plugin.nn.triton.row_norm`, against layer normalisation in torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, bfloat16, float32, float64
from torch.testing import assert_close

from moxe_plugin.nn.ragged import RaggedRows, ragged_rows

pytest.importorskip("triton")

from moxe_plugin.nn.triton.partials import PartialSums
from moxe_plugin.nn.triton.row_norm import norm_backward, norm_forward

pytestmark = pytest.mark.usefixtures("wide_sums")

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


def differentiate(
    flat: Tensor, weight: Tensor, grad: Tensor, rows: RaggedRows, num_heads: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Give output and gradients, and the same by torch in float64."""
    out, stats = norm_forward(flat, weight, rows, num_heads, EPS)
    sums = PartialSums(rows)
    of_flat = norm_backward(grad, flat, weight, stats, rows, num_heads, sums)

    exact = [x.to(float64).requires_grad_() for x in (flat, weight)]
    heads = exact[0].unflatten(-1, (num_heads, -1))
    normed = F.layer_norm(heads, heads.shape[-1:], eps=EPS).flatten(-2)
    expected = normed * exact[1][expert_of_row(rows)]
    expected_grads = torch.autograd.grad(expected, exact, grad.to(float64))

    return [out, of_flat, *sums.add_up()], [expected, *expected_grads]


@pytest.mark.parametrize(("width", "num_heads"), [(40, 1), (24, 4), (320, 2)])
def test_matches_layer_norm(width: int, num_heads: int) -> None:
    rows = lay_out()
    # Halves of a wider tensor
    flat = (draw(rows.num_rows, 2 * width, seed=1) * 3 + 1)[:, width:]
    weight = draw(rows.num_experts, width, seed=3)
    grad = draw(rows.num_rows, 2 * width, seed=4)[:, :width]

    actual, expected = differentiate(flat, weight, grad, rows, num_heads)

    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y.to(float32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flat_dtype", [float32, bfloat16])
def test_takes_bfloat16(flat_dtype: torch.dtype) -> None:
    rows = lay_out()
    flat = draw(rows.num_rows, 48, seed=1).to(flat_dtype)
    weight = draw(rows.num_experts, 48, seed=2).to(bfloat16)
    grad = draw(rows.num_rows, 48, seed=4).to(bfloat16)

    actual, expected = differentiate(flat, weight, grad, rows, 2)

    assert [x.dtype for x in actual] == [bfloat16, flat_dtype, bfloat16]
    # Only the results are rounded to bfloat16.
    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y.to(x.dtype), rtol=2**-7, atol=1e-5)


def test_adds_the_gradient_from_elsewhere() -> None:
    rows = lay_out()
    flat, other, grad = (draw(rows.num_rows, 24, seed=x) for x in range(3))
    weight = draw(rows.num_experts, 24, seed=3)

    _, stats = norm_forward(flat, weight, rows, 1, EPS)
    args = (grad, flat, weight, stats, rows, 1)
    sums, same_sums = PartialSums(rows), PartialSums(rows)
    grad_flat = norm_backward(*args, sums)
    summed = norm_backward(*args, same_sums, other_grad=other)

    assert_close(summed, grad_flat + other)
    assert torch.equal(same_sums.add_up()[0], sums.add_up()[0])


def test_a_constant_row_stays_finite() -> None:
    rows = lay_out([[3]])
    flat, weight = torch.full((3, 40), 1e4), torch.ones(1, 40)

    out, stats = norm_forward(flat, weight, rows, 1, EPS)
    grad = norm_backward(
        draw(3, 40, seed=1), flat, weight, stats, rows, 1, PartialSums(rows)
    )

    assert_close(out, torch.zeros(3, 40))
    assert grad.isfinite().all()


def test_no_rows_give_zero_gradients() -> None:
    rows = lay_out([[0, 0], [0, 0]])
    flat, weight = torch.zeros(0, 40), torch.ones(2, 40)

    out, stats = norm_forward(flat, weight, rows, 1, EPS)
    sums = PartialSums(rows)
    grad = norm_backward(flat, flat, weight, stats, rows, 1, sums)
    (grad_weight,) = sums.add_up()

    assert out.shape == grad.shape == (0, 40)
    assert torch.equal(grad_weight, torch.zeros(2, 40))
