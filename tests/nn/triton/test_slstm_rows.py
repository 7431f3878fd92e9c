"""Tests of `moxe_plugin.nn.triton.slstm_rows`, against the cell's single steps."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, bfloat16, float16, float32
from torch.testing import assert_close

from moxe_plugin.nn.padding import EMPTY
from moxe_plugin.nn.ragged import RaggedRows, ragged_rows
from moxe_plugin.nn.slstm_cell import SLSTMMemory, slstm_step

pytest.importorskip("triton")

from moxe_plugin.nn.triton import slstm_rows_launch
from moxe_plugin.nn.triton.slstm_rows import slstm_rows, supports

NUM_HEADS = 2

# More segments than a program has, none of an expert's, empty ones at both ends
LENS = [
    [3, 0, 5, 1, 2, 2, 7, 4, 6],
    [0] * 9,
    [0, 5, 2, 0, 0, 0, 1, 9, 0],
]


def draw_inputs(rows: RaggedRows, head_dim: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    width = NUM_HEADS * 2 * head_dim
    stack = (rows.num_experts, NUM_HEADS)

    return [
        draw(2, rows.num_rows, width),
        draw(*stack, 4, head_dim),
        draw(*stack, head_dim, 4, head_dim) * head_dim**-0.5,
    ]


def run_steps(inputs: Tensor, bias: Tensor, weight: Tensor, rows: RaggedRows) -> Tensor:
    """Compute in float64, row by row."""
    head_dim = bias.size(-1)
    # (2,C,H*2D) -> (C,H,4,D)
    pairs = inputs.view(2, -1, NUM_HEADS, 2, head_dim)
    gates = torch.cat(list(pairs), dim=2)
    begins = rows.begins.tolist()
    outputs = []

    for segment, (begin, end) in enumerate(pairwise(begins)):
        expert = segment // rows.num_seqs
        empty = gates.new_zeros(NUM_HEADS, head_dim, 1)
        memory = SLSTMMemory(empty, empty + EMPTY, empty)

        for row in range(begin, end):
            gate_inputs = (gates[row] + bias[expert]).unsqueeze(-1)
            _, memory = slstm_step(gate_inputs, weight[expert], memory)
            outputs.append(memory.y.flatten())

    return torch.stack(outputs)


# Programs have 4 segments where there are multiprocessors enough, else 8.
@pytest.mark.parametrize(
    ("head_dim", "dtype", "num_processors"),
    [(16, float16, 132), (48, bfloat16, 132), (48, bfloat16, 8), (80, bfloat16, 8)],
)
def test_slstm_rows_match_single_steps(
    head_dim: int,
    dtype: torch.dtype,
    num_processors: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        slstm_rows_launch, "count_multiprocessors", lambda _: num_processors
    )
    rows = ragged_rows(LENS, device)
    inputs = [x.to(device, dtype) for x in draw_inputs(rows, head_dim)]
    expected_inputs = [x.double() for x in inputs]
    for leaves in (inputs, expected_inputs):
        for leaf in leaves:
            leaf.requires_grad_()

    outputs = slstm_rows(inputs[0], inputs[1], inputs[2], rows)
    expected = run_steps(
        expected_inputs[0], expected_inputs[1], expected_inputs[2], rows
    )

    assert outputs.dtype == dtype
    assert_close(outputs.double(), expected, atol=2e-2, rtol=0)
    assert (outputs - expected).norm() < 4e-3 * expected.norm()

    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    grad = grad.to(device)
    grads = torch.autograd.grad(outputs, inputs, grad.to(dtype))
    expected_grads = torch.autograd.grad(expected, expected_inputs, grad)
    for actual, wanted, leaf in zip(grads, expected_grads, inputs, strict=True):
        assert actual.dtype == leaf.dtype
        assert (actual - wanted).norm() < 1e-2 * wanted.norm()
    # An expert without a row
    assert not grads[1][1].any()
    assert not grads[2][1].any()


@pytest.mark.parametrize(
    ("head_dim", "dtype", "expected"),
    [
        (160, bfloat16, True),
        (128, float16, True),
        # R would not fit
        (160, float32, False),
        (256, bfloat16, False),
        # Neither a power of two nor the sum of two, or too small a tail
        (112, bfloat16, False),
        (24, bfloat16, False),
        (8, bfloat16, False),
    ],
)
def test_supports_what_fits_on_chip(
    head_dim: int, dtype: torch.dtype, expected: bool
) -> None:
    assert supports(head_dim, dtype) is expected
