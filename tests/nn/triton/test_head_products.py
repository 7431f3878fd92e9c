"""Tests of `moxe_plugin.nn.triton.head_products`, against gathered weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, bfloat16, float32
from torch.testing import assert_close

pytest.importorskip("triton")

from moxe_plugin.nn.ragged import RaggedRows, ragged_rows
from moxe_plugin.nn.triton import head_products
from moxe_plugin.nn.triton.head_products import (
    gate_products,
    gate_products_backward,
    gate_weight_grads,
)
from moxe_plugin.nn.triton.partials import PartialSums

pytestmark = pytest.mark.usefixtures("wide_sums")

NUM_HEADS = 2
LAYOUTS = [
    pytest.param([[40, 0, 1], [0] * 3, [1, 5, 0], [64, 0, 20]], id="idle"),
    pytest.param([[0], [128], [64]], id="whole_blocks"),
    pytest.param([[0, 0], [0, 0]], id="no_row"),
    pytest.param([[75, 0, 66]], id="no_bank"),
]


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_products, "_RUN", 64)


def draw(rows: RaggedRows, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows.num_rows + head_dim)
    width = NUM_HEADS * head_dim
    shapes = [
        *[(rows.num_rows, width)] * 3,
        (2, rows.num_rows, 2 * width),
        (rows.num_experts, NUM_HEADS, head_dim, 4, head_dim),
    ]

    return [
        torch.randn(x, generator=generator).to(rows.begins.device, dtype)
        for x in shapes
    ]


def multiply(inputs: Tensor, weight: Tensor, rows: RaggedRows) -> Tensor:
    """Multiply ``(C,H*D)`` by ``(E,H,D,2,D)``, gathered for each row."""
    experts = (rows.segment_of_row // rows.num_seqs).long()
    by_head = inputs.unflatten(1, (NUM_HEADS, -1))

    return torch.einsum("chi,chigo->chgo", by_head, weight[experts]).flatten(1)


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(float32, 16), (bfloat16, 48)], ids=str
)
@pytest.mark.parametrize("seq_lens", LAYOUTS)
def test_kernels_are_the_products_of_each_head_with_gradients(
    seq_lens: list[list[int]], dtype: torch.dtype, head_dim: int, device: torch.device
) -> None:
    rows = ragged_rows(seq_lens, device)
    before, convolved, normed, grad_gates, weight = draw(rows, head_dim, dtype)

    gates = gate_products(convolved, normed, weight, rows)
    grads = gate_products_backward(grad_gates, weight, rows)
    sums = PartialSums(rows)
    gate_weight_grads(before, convolved, normed, grad_gates, weight, rows, sums)
    grad_weights = sums.add_up()

    h, u, x, w = (y.double() for y in (before, convolved, normed, weight))
    directions = tuple(grad_gates.double())
    leaves = [y.requires_grad_() for y in (u, x, w, w.clone())]
    w_if, w_zo = w[:, :, :, :2], w[:, :, :, 2:]
    exact = (multiply(u, w_if, rows), multiply(x, w_zo, rows))
    recurrent = [multiply(h, part, rows) for part in leaves[3].split(2, dim=3)]
    *exact_grads, of_proj, of_recurrent = torch.autograd.grad(
        (*exact, *recurrent), leaves, directions * 2
    )
    for y, expected in zip(
        (*gates, *grads, *grad_weights),
        (*exact, *exact_grads, of_recurrent, of_proj),
        strict=True,
    ):
        assert y.dtype == dtype
        # Relative to the largest, as sums cancel
        largest = float(expected.detach().abs().max()) if expected.numel() else 1.0
        tolerance = 1e-2 if dtype == bfloat16 else 1e-6
        assert_close(y.double(), expected, rtol=0, atol=tolerance * max(largest, 1.0))


def test_gradients_have_the_type_of_their_weight(device: torch.device) -> None:
    rows = ragged_rows([[20, 1], [0, 30]], device)
    before, convolved, normed, grads, weight = draw(rows, 16, bfloat16)

    wide, narrow = PartialSums(rows), PartialSums(rows)
    for like, sums in ((weight.float(), wide), (weight, narrow)):
        gate_weight_grads(before, convolved, normed, grads, like, rows, sums)

    for x, y in zip(wide.add_up(), narrow.add_up(), strict=True):
        assert x.dtype == float32
        # The interpreter rounds to bfloat16 by cutting off.
        assert_close(x.to(bfloat16), y, rtol=2**-7, atol=0)


@pytest.mark.parametrize("head_dim", [8, 24, 112])
def test_heads_that_no_two_tiles_fit_are_named(
    head_dim: int, device: torch.device
) -> None:
    rows = ragged_rows([[3]], device)
    _, convolved, normed, _, weight = draw(rows, head_dim, float32)

    with pytest.raises(ValueError, match=f"but have heads of {head_dim} instead"):
        gate_products(convolved, normed, weight, rows)
