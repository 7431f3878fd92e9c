"""The positions of right-padded sequences without the padding, sorted by expert."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override

from moxe_plugin.nn.padding import valid_positions


class Rows(NamedTuple):
    """Where the C positions that are not padding stand in a grid ``(E,N,S,…)``."""

    grid_shape: tuple[int, int, int]
    """Experts, sequences and padded length of the grid."""

    counts: list[int]
    """The number of rows of each expert, 0 allowed."""

    seq_lens: list[int]
    """The number of rows of each sub-sequence, a sequence's part at an expert: E * N of
    them, expert by expert."""

    slot_of_row: Tensor
    """The position of each row in the flat grid, ascending, so that rows come by
    (expert, sequence, time). *Shape:* ``(C)``."""

    segment_of_row: Tensor
    """The sub-sequence of each row. *Shape:* ``(C)``."""

    step_of_row: Tensor
    """Where each row stands in its sub-sequence, from 0. *Shape:* ``(C)``."""


def find_rows(seq_lens: Tensor, seq_len: int) -> Rows:
    """Find the positions that are not padding.

    :param seq_lens: The lengths, 0 allowed. *Shape:* ``(E,N)``.
    :param seq_len: The padded length S.

    :returns: The rows.
    """
    num_experts, num_seqs = seq_lens.shape

    lens: list[list[int]] = seq_lens.tolist()
    slot_of_row = valid_positions(seq_lens, seq_len).flatten().nonzero().squeeze(1)

    return Rows(
        (num_experts, num_seqs, seq_len),
        [sum(expert_lens) for expert_lens in lens],
        [length for expert_lens in lens for length in expert_lens],
        slot_of_row,
        slot_of_row // seq_len,
        slot_of_row % seq_len,
    )


def pack(grid: Tensor, rows: Rows) -> Tensor:
    """Leave out the padding.

    :param grid: *Shape:* ``(E,N,S,M)``.
    :param rows: The positions to keep.

    :returns: *Shape:* ``(C,M)``.
    """
    return take_rows(grid.flatten(0, 2), rows.slot_of_row)


def unpack(flat: Tensor, rows: Rows) -> Tensor:
    """Put padding back, as zeros.

    :param flat: *Shape:* ``(C,M)``.
    :param rows: The positions of the rows.

    :returns: *Shape:* ``(E,N,S,M)``.
    """
    num_experts, num_seqs, seq_len = rows.grid_shape
    slots = fill_slots(flat, rows.slot_of_row, num_experts * num_seqs * seq_len)

    return slots.view(*rows.grid_shape, flat.size(-1))


def take_rows(slots: Tensor, slot_of_row: Tensor) -> Tensor:
    """Copy some of the slots.

    :param slots: *Shape:* ``(G,M)``.
    :param slot_of_row: Which, none of them twice. *Shape:* ``(C)``.

    :returns: *Shape:* ``(C,M)``.
    """
    return _TakeRows.apply(slots, slot_of_row)  # type: ignore[no-any-return, no-untyped-call]  # torch


def fill_slots(flat: Tensor, slot_of_row: Tensor, num_slots: int) -> Tensor:
    """Copy rows into slots; the others are 0.

    :param flat: *Shape:* ``(C,M)``.
    :param slot_of_row: The slot of each row, none of them twice. *Shape:* ``(C)``.
    :param num_slots: The number of slots G.

    :returns: *Shape:* ``(G,M)``.
    """
    slots = flat.new_zeros(num_slots, flat.size(-1))

    return slots.index_copy(0, slot_of_row, flat)


def shift_rows(
    flat: Tensor, num_steps: int, rows: Rows, window: Tensor | None
) -> Tensor:
    """Give each row what its sub-sequence had some steps before.

    :param flat: *Shape:* ``(C,M)``.
    :param num_steps: How many steps, at least 1.
    :param rows: The rows.
    :param window: The last K-1 steps before each sub-sequence, ``K > num_steps``; zeros
        if ``None``. *Shape:* ``(E,N,K-1,M)``.

    :returns: *Shape:* ``(C,M)``.
    """
    before = torch.cat([flat.new_zeros(num_steps, flat.size(1)), flat])[: flat.size(0)]
    is_inside = (rows.step_of_row >= num_steps).unsqueeze(1)

    if window is None:
        return before.where(is_inside, 0.0)

    window_len = window.size(2)
    step = (window_len - num_steps + rows.step_of_row).clamp(max=window_len - 1)
    outside = window.flatten(0, 2)[rows.segment_of_row * window_len + step]

    return before.where(is_inside, outside.to(flat.dtype))


def last_rows(flat: Tensor, rows: Rows, window: Tensor) -> Tensor:
    """Find the last K-1 steps of each sub-sequence.

    :param flat: *Shape:* ``(C,M)``.
    :param rows: The rows.
    :param window: The steps before each sub-sequence, into which shorter ones reach
        back. *Shape:* ``(E,N,K-1,M)``.

    :returns: *Shape:* ``(E,N,K-1,M)``.
    """
    num_segments, window_len = window.size(0) * window.size(1), window.size(2)

    lens = torch.tensor(rows.seq_lens, device=flat.device).unsqueeze(1)
    ends = lens.cumsum(dim=0)
    back = torch.arange(window_len, 0, -1, device=flat.device)

    # Rows of the window come first, then those of all sub-sequences.
    segment_ids = torch.arange(num_segments, device=flat.device).unsqueeze(1)
    in_window = segment_ids * window_len + (window_len + lens - back)
    in_rows = num_segments * window_len + ends - back
    index = torch.where(back <= lens, in_rows, in_window)

    steps = torch.cat([window.flatten(0, 2).to(flat.dtype), flat])

    return steps[index.flatten()].view(*window.shape)


class _TakeRows(Function):
    # As no slot is taken twice, the gradient is a copy: that of an index_select adds.

    @staticmethod
    @override
    def forward(ctx: Any, slots: Tensor, slot_of_row: Tensor) -> Tensor:
        ctx.save_for_backward(slot_of_row)
        ctx.num_slots = slots.size(0)

        return slots.index_select(0, slot_of_row)

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (slot_of_row,) = ctx.saved_tensors
        slots = grad_output.new_zeros(ctx.num_slots, grad_output.size(1))

        return slots.index_copy_(0, slot_of_row, grad_output), None
