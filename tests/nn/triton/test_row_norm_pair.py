"""Tests of `moxe_plugin.nn.triton.row_norm_pair`, against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, bfloat16, float32, float64
from torch.testing import assert_close

from moxe_plugin.nn.ragged import RaggedRows, ragged_rows

pytest.importorskip("triton")

from moxe_plugin.nn.triton.partials import PartialSums
from moxe_plugin.nn.triton.row_norm_pair import norm_pair_backward, norm_pair_forward

pytestmark = pytest.mark.usefixtures("wide_sums")

EPS = 1e-5

# As in `test_row_norm`
ROWS = ragged_rows([[5, 0], [0, 0], [1, 39], [2, 30], [0, 0]], torch.device("cpu"))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_inputs(rows: RaggedRows, width: int) -> list[Tensor]:
    """Draw rows, halves of a wider tensor, and weights, in the order of arguments."""
    wide = draw(rows.num_rows, 2 * width, seed=1) * 3 + 1
    weights = [draw(rows.num_experts, width, seed=x) for x in (3, 4)]

    return [wide[:, :width], weights[0], wide[:, width:], weights[1]]


def norm(x: Tensor, num_heads: int) -> Tensor:
    heads = x.unflatten(-1, (num_heads, -1))

    return F.layer_norm(heads, heads.shape[-1:], eps=EPS).flatten(-2)


def run(
    inputs: list[Tensor], grads: list[Tensor], rows: RaggedRows, num_heads: int
) -> list[Tensor]:
    """Give both outputs, and the gradients in the order of arguments."""
    flat, weight, residual, next_weight = inputs
    summed, normed_sum, stats = norm_pair_forward(
        flat, weight, residual, next_weight, rows, num_heads, EPS
    )
    of_summed, of_normed_sum = grads
    sums = PartialSums(rows)
    of_flat, of_residual = norm_pair_backward(
        *(of_summed, of_normed_sum, flat, weight, summed, next_weight, stats),
        *(rows, num_heads, sums),
    )
    of_weight, of_next_weight = sums.add_up()

    return [summed, normed_sum, of_flat, of_weight, of_residual, of_next_weight]


def differentiate(
    inputs: list[Tensor], grads: list[Tensor], num_heads: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Give outputs and gradients, and the same by torch in float64."""
    actual = run(inputs, grads, ROWS, num_heads)

    exact = [x.to(float64).requires_grad_() for x in inputs]
    expert = ROWS.segment_of_row // ROWS.num_seqs
    summed = exact[2] + norm(exact[0], num_heads) * exact[1][expert]
    # The norm of what is returned, which may be rounded
    returned = summed + (actual[0] - summed.detach())
    expected = [returned, norm(returned, 1) * exact[3][expert]]
    exact_grads = torch.autograd.grad(expected, exact, [x.to(float64) for x in grads])

    return actual, [summed, expected[1], *exact_grads]


@pytest.mark.parametrize(("width", "num_heads"), [(40, 1), (30, 3), (320, 2)])
def test_matches_torch(width: int, num_heads: int) -> None:
    grads = [draw(ROWS.num_rows, 2 * width, seed=x)[:, width:] for x in (5, 6)]

    actual, expected = differentiate(draw_inputs(ROWS, width), grads, num_heads)

    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y.to(float32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flat_dtype", [float32, bfloat16])
def test_takes_bfloat16(flat_dtype: torch.dtype) -> None:
    flat, *others = draw_inputs(ROWS, 48)
    inputs = [flat.to(flat_dtype), *(x.to(bfloat16) for x in others)]
    grads = [draw(ROWS.num_rows, 48, seed=x).to(bfloat16) for x in (5, 6)]

    actual, expected = differentiate(inputs, grads, 4)

    assert [x.dtype for x in actual] == [bfloat16] * 2 + [x.dtype for x in inputs]
    # Only the results are rounded to bfloat16.
    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y.to(x.dtype), rtol=2**-7, atol=1e-5)


def test_no_rows_give_zero_gradients() -> None:
    rows = ragged_rows([[0, 0], [0, 0]], torch.device("cpu"))

    actual = run(draw_inputs(rows, 24), [torch.ones(0, 24)] * 2, rows, 4)

    for grad in (actual[3], actual[5]):
        assert torch.equal(grad, torch.zeros(2, 24))
