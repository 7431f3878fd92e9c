"""Tests of `moxe_plugin.nn.triton.row_conv`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn.functional import silu
from torch.testing import assert_close

pytest.importorskip("triton")

from moxe_plugin.nn.ragged import RaggedRows, ragged_rows
from moxe_plugin.nn.triton import row_conv
from moxe_plugin.nn.triton.partials import PartialSums
from moxe_plugin.nn.triton.row_conv import (
    causal_conv_silu_backward,
    causal_conv_silu_forward,
)

pytestmark = pytest.mark.usefixtures("wide_sums")

K = 4
# Blocks have 32 rows forward and 128 backward, and 128 columns, backward 64 of rows of
# less than 140.
LENS = [
    pytest.param([[5, 40], [90, 1]], 140, id="wide"),
    pytest.param([[67, 1, 2]], 130, id="no-bank"),
    pytest.param([[3, 0, 60], [0, 0, 0], [1, 5, 2], [1, 0, 71]], 6, id="bank"),
    pytest.param([[0, 0], [64, 0], [0, 0], [0, 64], [0, 0]], 4, id="ends-at-blocks"),
    pytest.param([[0, 0], [0, 0]], 5, id="no-row"),
]


@pytest.fixture(autouse=True)
def wide_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not 1,024, which take the interpreter long
    monkeypatch.setattr(row_conv, "_WIDE", 140)


def make_inputs(
    lens: list[list[int]], width: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, RaggedRows]:
    rows = ragged_rows(lens, device)
    # A half of wider rows
    flat = torch.randn(rows.num_rows, 2 * width, device=device)[:, :width]
    weight = torch.randn(len(lens), K, width, device=device)
    bias = torch.randn(len(lens), width, device=device)

    return flat, weight, bias, rows


def reference(
    flat: Tensor, weight: Tensor, bias: Tensor, lens: list[list[int]]
) -> Tensor:
    outputs, begin = [], 0
    for e, of_expert in enumerate(lens):
        for length in of_expert:
            seq = flat[begin : begin + length]
            padded = torch.cat([seq.new_zeros(K - 1, seq.size(1)), seq])
            taps = (weight[e, k] * padded[k : k + length] for k in range(K))
            outputs.append(silu(bias[e] + sum(taps)))
            begin += length

    return torch.cat(outputs)


def differentiate(
    inputs: tuple[Tensor, Tensor, Tensor], rows: RaggedRows, lens: list[list[int]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Give output and gradients, and the same by torch in float64."""
    output = causal_conv_silu_forward(*inputs, rows)
    upstream = torch.randn_like(output)
    sums = PartialSums(rows)
    of_flat = causal_conv_silu_backward(upstream, *inputs, rows, sums)
    grads = [of_flat, *sums.add_up()]

    flat, weight, bias = exact = [x.double().requires_grad_() for x in inputs]
    expected = reference(flat, weight, bias, lens)

    return [output, *grads], [expected, *grad(expected, exact, upstream.double())]


@pytest.mark.parametrize(("lens", "width"), LENS)
def test_outputs_and_gradients_are_those_of_each_segment(
    lens: list[list[int]], width: int, device: torch.device
) -> None:
    flat, weight, bias, rows = make_inputs(lens, width, device)

    actual, expected = differentiate((flat, weight, bias), rows, lens)

    assert_close(actual[0], expected[0].float())
    for x, y in zip(actual[1:], expected[1:], strict=True):
        # Sums of up to 70 products, which cancel
        assert_close(x, y.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("of_parameters", [torch.bfloat16, torch.float32])
def test_bfloat16_is_rounded_once(
    of_parameters: torch.dtype, device: torch.device
) -> None:
    lens = [[9, 70], [0, 8]]
    flat, weight, bias, rows = make_inputs(lens, 6, device)
    inputs = (flat.bfloat16(), weight.to(of_parameters), bias.to(of_parameters))

    actual, expected = differentiate(inputs, rows, lens)

    for x, y in zip(actual, expected, strict=True):
        # bfloat16 keeps 8 bits, and Triton's interpreter truncates to it.
        assert_close(x.double(), y, rtol=2**-7, atol=1e-5)
    assert [x.dtype for x in actual[1:]] == [x.dtype for x in inputs]


@pytest.mark.parametrize("in_place", [False, True])
def test_gradient_of_inputs_is_added_to_another_in_wider_rows(
    in_place: bool, device: torch.device
) -> None:
    lens = [[66, 1], [2, 4]]
    flat, weight, bias, rows = make_inputs(lens, 6, device)
    upstream = torch.randn(rows.num_rows, 12, device=device)[:, 6:]
    others = torch.randn(rows.num_rows, 12, device=device)
    wide = others.clone() if in_place else torch.full_like(others, 7)
    out = wide[:, :6]

    args = (upstream, flat, weight, bias, rows, PartialSums(rows))
    alone = causal_conv_silu_backward(*args)
    add = out if in_place else others[:, :6]
    result = causal_conv_silu_backward(*args, out=out, add=add)

    assert result is out
    assert_close(out, alone + others[:, :6])
    # What is beside it stays as it was.
    assert_close(wide[:, 6:], others[:, 6:] if in_place else torch.full_like(out, 7))


def test_block_that_is_no_bank_has_parameters_without_experts(
    device: torch.device,
) -> None:
    flat, weight, bias, rows = make_inputs([[5, 3]], 6, device)
    inputs = flat, weight[0], bias[0]

    actual = causal_conv_silu_forward(*inputs, rows)
    sums = PartialSums(rows)
    of_flat = causal_conv_silu_backward(torch.ones_like(actual), *inputs, rows, sums)

    assert_close(actual, reference(flat, weight, bias, [[5, 3]]))
    grads = [of_flat, *sums.add_up()]
    assert [x.shape for x in grads] == [x.shape for x in inputs]


def test_other_numbers_of_taps_are_refused(device: torch.device) -> None:
    flat, weight, bias, rows = make_inputs([[5, 3]], 6, device)

    with pytest.raises(ValueError, match="must have 4 taps, but has 3"):
        causal_conv_silu_forward(flat, weight[:, 1:], bias, rows)
