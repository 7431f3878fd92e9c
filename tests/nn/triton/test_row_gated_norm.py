"""Tests of `moxe_plugin.nn.triton.row_gated_norm`, against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, bfloat16, float32, float64
from torch.testing import assert_close

from moxe_plugin.nn.ragged import RaggedRows, ragged_rows

pytest.importorskip("triton")

from moxe_plugin.nn.triton.partials import PartialSums
from moxe_plugin.nn.triton.row_gated_norm import (  # needs Triton
    GatedNormInputs,
    gated_norm_backward,
    gated_norm_forward,
)

pytestmark = pytest.mark.usefixtures("wide_sums")

EPS = 1e-5

# As in `test_row_norm`
ROWS = ragged_rows([[5, 0], [0, 0], [1, 39], [2, 30], [0, 0]], torch.device("cpu"))


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draw_inputs(rows: RaggedRows, width: int) -> list[Tensor]:
    """Draw the inputs; of the rows, all but the first are halves of a wider tensor."""
    wide = draw(rows.num_rows, 4 * width, seed=1) * 3

    return [
        draw(rows.num_rows, width, seed=2) * 2 + 1,
        wide[:, :width],
        wide[:, 2 * width : 3 * width],
        *(draw(rows.num_experts, width, seed=x) for x in (3, 4)),
    ]


def reference(inputs: list[Tensor], rows: RaggedRows, num_heads: int) -> Tensor:
    hidden, convolved, gate, norm_weight, skip = inputs
    expert = rows.segment_of_row // rows.num_seqs
    heads = hidden.unflatten(-1, (num_heads, -1))
    normed = F.layer_norm(heads, heads.shape[-1:], eps=EPS).flatten(-2)

    return (normed * norm_weight[expert] + skip[expert] * convolved) * F.silu(gate)


def differentiate(
    inputs: list[Tensor], grad: Tensor, num_heads: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Give output and gradients, and the same by torch in float64."""
    own = GatedNormInputs(*inputs)
    out, stats = gated_norm_forward(own, ROWS, num_heads, EPS)
    sums = PartialSums(ROWS)
    grads = gated_norm_backward(grad, own, stats, ROWS, num_heads, sums)

    exact = [x.to(float64).requires_grad_() for x in inputs]
    expected = reference(exact, ROWS, num_heads)
    expected_grads = torch.autograd.grad(expected, exact, grad.to(float64))

    return [out, *grads, *sums.add_up()], [expected, *expected_grads]


@pytest.mark.parametrize(("width", "num_heads"), [(40, 1), (24, 4), (320, 2)])
def test_matches_torch(width: int, num_heads: int) -> None:
    grad = draw(ROWS.num_rows, 2 * width, seed=5)[:, width:]

    actual, expected = differentiate(draw_inputs(ROWS, width), grad, num_heads)

    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y.to(float32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden_dtype", [float32, bfloat16])
def test_takes_bfloat16(hidden_dtype: torch.dtype) -> None:
    hidden, *others = draw_inputs(ROWS, 48)
    inputs = [hidden.to(hidden_dtype), *(x.to(bfloat16) for x in others)]
    grad = draw(ROWS.num_rows, 48, seed=5).to(bfloat16)

    actual, expected = differentiate(inputs, grad, 4)

    assert [x.dtype for x in actual] == [bfloat16, *(x.dtype for x in inputs)]
    # Only the results are rounded to bfloat16.
    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y.to(x.dtype), rtol=2**-7, atol=1e-5)


def test_writes_the_gradient_of_the_gate_where_told() -> None:
    inputs = GatedNormInputs(*draw_inputs(ROWS, 24))
    grad = draw(ROWS.num_rows, 24, seed=5)
    _, stats = gated_norm_forward(inputs, ROWS, 2, EPS)
    args = (grad, inputs, stats, ROWS, 2)
    expected_sums, sums = PartialSums(ROWS), PartialSums(ROWS)
    expected = gated_norm_backward(*args, expected_sums)

    wide = torch.full((ROWS.num_rows, 48), 7.0)
    actual = gated_norm_backward(*args, sums, wide[:, 24:])

    assert torch.equal(wide[:, 24:], expected.gate)
    assert torch.equal(wide[:, :24], torch.full((ROWS.num_rows, 24), 7.0))
    for x, y in zip(
        [*actual, *sums.add_up()], [*expected, *expected_sums.add_up()], strict=True
    ):
        assert torch.equal(x, y)


def test_no_rows_give_zero_gradients() -> None:
    rows = ragged_rows([[0, 0], [0, 0]], torch.device("cpu"))
    inputs = GatedNormInputs(*draw_inputs(rows, 24))

    out, stats = gated_norm_forward(inputs, rows, 4, EPS)
    sums = PartialSums(rows)
    gated_norm_backward(torch.ones(0, 24), inputs, stats, rows, 4, sums)

    assert out.shape == (0, 24)
    for grad in sums.add_up():
        assert torch.equal(grad, torch.zeros(2, 24))
