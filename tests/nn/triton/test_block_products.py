"""Tests of `moxe_plugin.nn.triton.block_products`, against the block's own products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, bfloat16, float32, float64
from torch.testing import assert_close

pytest.importorskip("triton")

from moxe_plugin.nn.ragged import RaggedRows, ragged_rows
from moxe_plugin.nn.triton import block_products
from moxe_plugin.nn.triton.block_products import (
    CellWeights,
    project_backward,
    project_forward,
)
from moxe_plugin.nn.triton.partials import PartialSums

pytestmark = pytest.mark.usefixtures("wide_sums")

NUM_HEADS = 3
LAYOUTS = [
    pytest.param([[40, 0, 1], [0] * 3, [1, 5, 0], [64, 0, 9]], id="idle"),
    pytest.param([[0], [64], [64]], id="whole_blocks"),
    pytest.param([[0, 0], [0, 0]], id="no_row"),
    pytest.param([[75, 0, 66]], id="no_bank"),
]


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_products, "_RUN", 128)


def draw(
    rows: RaggedRows, num_groups: int, block: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, CellWeights]:
    generator = torch.Generator().manual_seed(rows.num_rows + block)
    width, bank = num_groups * block, () if rows.num_experts == 1 else rows.counts

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(
            rows.begins.device, dtype
        )

    experts = [len(bank)] if bank else []
    blocks = [normal(*experts, num_groups, block, block, scale=0.3) for _ in range(3)]
    gates = [normal(*experts, 3 * width, NUM_HEADS, scale=0.2) for _ in range(2)]
    biases = [normal(*experts, NUM_HEADS) for _ in range(2)]
    # The first half of what the block projects up
    conv_input = normal(rows.num_rows, 2 * width)[:, :width]

    return (
        normal(rows.num_rows, width),
        conv_input,
        CellWeights(*blocks, *gates, *biases),
    )


def compute_reference(
    convolved: Tensor, conv_input: Tensor, weights: CellWeights, rows: RaggedRows
) -> tuple[Tensor, Tensor]:
    """Multiply each row by weights that are gathered for it."""
    q_weight, k_weight, v_weight, *others = weights
    if rows.num_experts == 1:
        q_weight, k_weight, v_weight, *others = (x[None] for x in weights)
    experts = (rows.segment_of_row // rows.num_seqs).long()

    def head_wise(x: Tensor, weight: Tensor) -> Tensor:
        grouped = x.unflatten(1, weight.shape[1:3])
        return torch.einsum("cgi,cgio->cgo", grouped, weight[experts]).flatten(1)

    q, k = head_wise(convolved, q_weight), head_wise(convolved, k_weight)
    qkv = torch.cat([q, k, head_wise(conv_input, v_weight)], 1)
    weight, bias = torch.cat(others[:2], -1), torch.cat(others[2:], -1)

    return qkv, torch.einsum("ci,cio->co", qkv, weight[experts]) + bias[experts]


def run(
    convolved: Tensor,
    conv_input: Tensor,
    weights: CellWeights,
    rows: RaggedRows,
    directions: list[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """Give outputs, and the gradients of what is given."""
    inputs = (convolved, conv_input, weights, rows)
    of_u, of_a = torch.empty_like(convolved), torch.empty_like(convolved)
    of_qkv, of_gates = directions
    sums = PartialSums(rows)
    project_backward(of_qkv, of_gates, *inputs, sums, of_u, of_a)

    return list(project_forward(*inputs)), [of_u, of_a, *sums.add_up()]


@pytest.mark.parametrize(
    ("dtype", "num_groups", "block"),
    [(float32, 3, 16), (float32, 3, 4), (float32, 1, 64), (bfloat16, 3, 32)],
    ids=str,
)
@pytest.mark.parametrize("seq_lens", LAYOUTS)
def test_kernels_are_the_products_of_the_block_with_gradients(
    seq_lens: list[list[int]],
    dtype: torch.dtype,
    num_groups: int,
    block: int,
    device: torch.device,
) -> None:
    rows = ragged_rows(seq_lens, device)
    convolved, conv_input, weights = draw(rows, num_groups, block, dtype)
    exact = [x.to(float64).requires_grad_() for x in (convolved, conv_input, *weights)]
    u, a, *params = exact
    expected = compute_reference(u, a, CellWeights(*params), rows)
    directions = [
        torch.randn_like(x, dtype=y)
        for x, y in zip(expected, (dtype, float32), strict=True)
    ]

    actual, actual_grads = run(convolved, conv_input, weights, rows, directions)

    assert [x.dtype for x in actual] == [dtype, float32]
    expected_grads = torch.autograd.grad(
        expected, exact, [x.double() for x in directions]
    )
    for x, y in zip(
        [*actual, *actual_grads], [*expected, *expected_grads], strict=True
    ):
        # Relative to the largest, as sums cancel
        largest = float(y.detach().abs().max()) if y.numel() else 1.0
        tolerance = 2e-2 if dtype == bfloat16 else 1e-5
        assert_close(x.double(), y, rtol=tolerance, atol=tolerance * max(largest, 1.0))
    assert all(x.is_contiguous() for x in actual_grads)


def test_weights_may_be_wider_than_rows(device: torch.device) -> None:
    rows = ragged_rows([[20, 1], [0, 30]], device)
    convolved, conv_input, weights = draw(rows, 2, 16, bfloat16)
    wide = CellWeights(*(x.float() for x in weights))

    width = convolved.size(1)
    directions = [
        torch.ones(rows.num_rows, 3 * width, device=device, dtype=bfloat16),
        torch.ones(rows.num_rows, 2 * NUM_HEADS, device=device),
    ]
    actual, grads = run(convolved, conv_input, wide, rows, directions)
    expected, same = run(convolved, conv_input, weights, rows, directions)

    assert_close(actual[0], expected[0], rtol=0, atol=0)
    # Biases are added in float32.
    assert_close(actual[1], expected[1], rtol=0, atol=0)
    assert [x.dtype for x in grads[2:]] == [float32] * 7
    for x, y in zip(grads[2:], same[2:], strict=True):
        # The interpreter rounds to bfloat16 by cutting off.
        assert_close(x.to(bfloat16), y, rtol=2**-7, atol=0)


def test_gradients_can_be_added_to_parts_of_wider_tensors(device: torch.device) -> None:
    rows = ragged_rows([[20, 1], [0, 30]], device)
    convolved, conv_input, weights = draw(rows, 2, 16, float32)
    grads = torch.randn(51, 96, device=device), torch.randn(51, 6, device=device)
    plain = [torch.empty_like(convolved) for _ in range(2)]
    wide = torch.randn(51, 64, device=device)
    parts = wide.clone().chunk(2, dim=1)
    inputs = (*grads, convolved, conv_input, weights, rows)

    expected, actual = PartialSums(rows), PartialSums(rows)
    project_backward(*inputs, expected, *plain)
    project_backward(*inputs, actual, *parts, adds_to_convolved=True)

    assert_close(actual.add_up(), expected.add_up(), rtol=0, atol=0)
    assert_close(parts[0], wide.chunk(2, dim=1)[0] + plain[0])
    assert_close(parts[1], plain[1], rtol=0, atol=0)


@pytest.mark.parametrize("block", [6, 128])
def test_blocks_that_no_tile_fits_are_named(block: int, device: torch.device) -> None:
    rows = ragged_rows([[3]], device)

    with pytest.raises(ValueError, match=f"at most 64, but has blocks of {block} "):
        project_forward(*draw(rows, 1, block, float32), rows)
