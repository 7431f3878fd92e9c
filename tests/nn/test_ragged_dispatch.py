"""Tests of `moxe_plugin.nn.ragged_dispatch`, against the dispatch to grids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, bfloat16, float32, tensor
from torch.testing import assert_close

from moxe_plugin.nn.dispatch import DispatchPlan, combine, dispatch, plan_dispatch
from moxe_plugin.nn.ragged_dispatch import (
    RowPlan,
    combine_rows,
    send_tokens,
)
from moxe_plugin.nn.rows import Rows, find_rows, pack, unpack

pytest.importorskip("triton")

WIDTH = 150
"""More than one tile, and no multiple of it"""

BATCHES = [
    # Sequences, length, choices, banks, with a mask, with empty places, idle expert
    pytest.param((3, 45, 2, [2, 3], False, False, None), id="full"),
    pytest.param((3, 45, 2, [2, 3], True, False, None), id="masked"),
    pytest.param((2, 7, 3, [3, 2], True, True, 1), id="empty_places-idle_expert"),
    pytest.param((70, 1, 1, [20], False, False, 4), id="one_bank-one_choice"),
    pytest.param((1, 90, 2, [9, 11], False, False, None), id="one_sequence"),
    pytest.param((2, 3, 1, [1, 1], False, False, 0), id="idle_bank"),
]


def draw_choices(
    batch: tuple[int, int, int, list[int], bool, bool, int | None],
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    """Return experts and a mask; of two sequences at least the first has no token."""
    num_seqs, seq_len, top_k, bank_sizes, has_mask, has_empty, idle = batch
    generator = torch.Generator().manual_seed(7)

    scores = torch.rand(num_seqs, seq_len, sum(bank_sizes), generator=generator)
    if idle is not None:
        scores[..., idle] = -1.0
    indices = scores.topk(top_k).indices

    if has_empty:
        indices[..., 1:] = indices[..., 1:].where(indices[..., 1:] % 2 == 0, -1)
    mask = None
    if has_mask:
        lens = torch.randint(1, seq_len + 1, (num_seqs, 1), generator=generator)
        lens[0] = 0
        mask = (torch.arange(seq_len) < lens).to(device)

    return indices.to(device), mask


def plan_rows(indices: Tensor, mask: Tensor | None, bank_sizes: list[int]) -> RowPlan:
    tokens = torch.zeros(indices[..., 0].numel(), 1, device=indices.device)

    return send_tokens(tokens, indices, mask, bank_sizes)[0]


def plan_both(
    batch: tuple[int, int, int, list[int], bool, bool, int | None],
    device: torch.device,
) -> tuple[RowPlan, DispatchPlan, list[Rows]]:
    indices, mask = draw_choices(batch, device)
    grid_plan = plan_dispatch(indices, mask, batch[3])

    return (
        plan_rows(indices, mask, batch[3]),
        grid_plan,
        [
            find_rows(lens, shape[2])
            for lens, shape in zip(
                grid_plan.grid_lens, grid_plan.grid_shapes, strict=True
            )
        ],
    )


@pytest.mark.parametrize("batch", BATCHES)
def test_rows_stand_as_those_of_grids(
    batch: tuple[int, int, int, list[int], bool, bool, int | None],
    device: torch.device,
) -> None:
    plan, grid_plan, grid_rows = plan_both(batch, device)

    for bank, lens, rows in zip(
        plan.banks, grid_plan.grid_lens, grid_rows, strict=True
    ):
        ends = lens.flatten().cumsum(dim=0).tolist()

        assert bank.num_seqs == batch[0]
        assert bank.counts == rows.counts
        assert bank.max_len == lens.max()
        assert bank.begins.tolist() == [0, *ends]
        assert bank.segment_of_row.tolist() == rows.segment_of_row.tolist()
        assert bank.step_of_row.tolist() == rows.step_of_row.tolist()
        assert all(x.dtype == torch.int32 for x in bank[3:])

    # A bank's tensors begin where the kernels of all steps' banks do.
    assert all(x.data_ptr() % 16 == 0 for bank in plan.banks for x in bank[3:])

    indices, mask = draw_choices(batch, device)
    is_sent = indices >= 0 if mask is None else (indices >= 0) & mask.unsqueeze(-1)
    sent = plan.row_of_choice[is_sent.flatten(0, 1)]

    assert sent.sort().values.tolist() == list(range(sum(plan.num_rows)))
    assert (plan.row_of_choice >= 0).flatten().equal(is_sent.flatten())


@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_outputs_and_gradients_are_those_of_grids(
    batch: tuple[int, int, int, list[int], bool, bool, int | None],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    torch.manual_seed(3)
    num_tokens, top_k = batch[0] * batch[1], batch[2]
    _, grid_plan, grid_rows = plan_both(batch, device)

    tokens = torch.randn(num_tokens, WIDTH, device=device).to(dtype).requires_grad_()
    weights = torch.rand(num_tokens, top_k, device=device, requires_grad=True)
    direction = torch.randn(num_tokens, WIDTH, device=device).to(dtype)

    # Something that differs by bank, and between rows of the same token
    plan, taken = send_tokens(tokens, *draw_choices(batch, device), batch[3])
    factors = [torch.randn(len(rows), WIDTH, device=device).to(dtype) for rows in taken]
    outputs = [rows * factor for rows, factor in zip(taken, factors, strict=True)]
    actual = combine_rows(outputs, weights, plan, dtype)

    packed = [
        pack(grid, rows)
        for grid, rows in zip(dispatch(tokens, grid_plan), grid_rows, strict=True)
    ]
    grids = [
        unpack(rows * factor, where)
        for rows, factor, where in zip(packed, factors, grid_rows, strict=True)
    ]
    expected = combine(grids, weights, grid_plan).to(dtype)

    for x, y in zip(taken, packed, strict=True):
        assert_close(x, y, rtol=0, atol=0)

    # Sums of at most 150 products; a gradient of bfloat16 is rounded thrice.
    tolerance = 1e-5 if dtype == float32 else 2e-2
    for x, y in zip(
        [actual, *torch.autograd.grad(actual, [tokens, weights], direction)],
        [expected, *torch.autograd.grad(expected, [tokens, weights], direction)],
        strict=True,
    ):
        assert x.dtype == y.dtype
        assert_close(x, y, rtol=tolerance, atol=tolerance * 4)


def test_rows_may_be_parts_of_wider_tensors(device: torch.device) -> None:
    torch.manual_seed(4)
    indices = tensor([[[0, 1], [2, 0], [1, 2]]], device=device)
    plan = plan_rows(indices, None, [2, 1])

    wide = [torch.randn(n, 40, device=device) for n in plan.num_rows]
    leaves = [x[:, 16:].requires_grad_() for x in wide]
    copies = [x.detach().clone().requires_grad_() for x in leaves]
    weights = torch.rand(3, 2, device=device, requires_grad=True)
    # An expanded gradient has strides of 0.
    direction = torch.ones(1, 1, device=device).expand(3, 24)

    actual = combine_rows(leaves, weights, plan, float32)
    expected = (
        torch.cat(copies)[plan.row_of_choice.long()] * weights.unsqueeze(-1)
    ).sum(dim=1)

    for x, y in zip(
        [actual, *torch.autograd.grad(actual, [*leaves, weights], direction)],
        [expected, *torch.autograd.grad(expected, [*copies, weights], direction)],
        strict=True,
    ):
        assert_close(x, y)


def test_a_batch_that_is_all_padding_gives_zeros(device: torch.device) -> None:
    indices = tensor([[[0, 1], [1, 2]]], device=device)
    mask = torch.zeros(1, 2, dtype=torch.bool, device=device)
    tokens = torch.randn(2, 5, device=device, requires_grad=True)
    weights = torch.rand(2, 2, device=device, requires_grad=True)

    plan, banks = send_tokens(tokens, indices, mask, [1, 2])
    summed = combine_rows(banks, weights, plan, float32)

    assert [len(rows) for rows in banks] == [0, 0]
    for x in (summed, *torch.autograd.grad(summed.sum(), [tokens, weights])):
        assert not x.any()


@pytest.mark.parametrize("bank_sizes", [[], [1, 1, 1]])
def test_number_of_banks_is_checked(
    bank_sizes: list[int], device: torch.device
) -> None:
    indices = torch.zeros(1, 1, 1, dtype=torch.int64, device=device)

    with pytest.raises(ValueError, match="`bank_sizes` must have 1 or 2 numbers"):
        plan_rows(indices, None, bank_sizes)
