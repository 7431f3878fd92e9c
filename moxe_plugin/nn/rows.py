"""The positions of right-padded sequences without the padding, sorted by expert."""

from __future__ import annotations

from typing import Any, NamedTuple

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

    slot_of_row: Tensor
    """The position of each row in the flat grid, ascending, so that rows come by
    (expert, sequence, time). *Shape:* ``(C)``."""


def find_rows(seq_lens: Tensor, seq_len: int) -> Rows:
    """Find the positions that are not padding.

    :param seq_lens: The lengths, 0 allowed. *Shape:* ``(E,N)``.
    :param seq_len: The padded length S.

    :returns: The rows.
    """
    num_experts, num_seqs = seq_lens.shape
    is_filled = valid_positions(seq_lens, seq_len)

    return Rows(
        (num_experts, num_seqs, seq_len),
        seq_lens.sum(dim=1).tolist(),
        is_filled.flatten().nonzero().squeeze(1),
    )


def pack(grid: Tensor, rows: Rows) -> Tensor:
    """Leave out the padding.

    :param grid: *Shape:* ``(E,N,S,M)``.
    :param rows: The positions to keep.

    :returns: *Shape:* ``(C,M)``.
    """
    return _Pack.apply(grid.flatten(0, 2), rows.slot_of_row)  # type: ignore[no-any-return, no-untyped-call]  # torch


def unpack(flat: Tensor, rows: Rows) -> Tensor:
    """Put padding back, as zeros.

    :param flat: *Shape:* ``(C,M)``.
    :param rows: The positions of the rows.

    :returns: *Shape:* ``(E,N,S,M)``.
    """
    num_experts, num_seqs, seq_len = rows.grid_shape
    slots = flat.new_zeros(num_experts * num_seqs * seq_len, flat.size(-1))

    # One to one, so that the gradient is a gather
    return slots.index_copy(0, rows.slot_of_row, flat).view(*rows.grid_shape, -1)


class _Pack(Function):
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
