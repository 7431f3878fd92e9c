"""Sums over the rows of each expert, in an order that is always the same.

A kernel whose program b reads the rows ``[b * R, (b + 1) * R)`` writes, for each expert
e that has rows among them, its sum of these to slot ``b + e``. As rows are sorted by
expert, no two programs write to the same slot. :func:`sum_partials` then adds up the
slots of each expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moxe_plugin.nn.ragged import RaggedRows
from moxe_plugin.nn.triton.launching import Launcher
from moxe_plugin.nn.triton.sizes import ceil_div

_NARROW = 64, 32
"""Slots and columns that a program adds up at a time, of a few sums."""

_WIDE = 16, 256
"""The same of many sums."""


def new_partials(rows: RaggedRows, rows_per_block: int, width: int) -> Tensor:
    """Create the slots.

    :param rows: The rows.
    :param rows_per_block: How many of them a program reads, R.
    :param width: The number of sums.

    :returns: Uninitialised float32. *Shape:* ``(slots,width)``.
    """
    num_blocks = ceil_div(rows.num_rows, rows_per_block)

    return torch.empty(
        max(num_blocks + rows.num_experts - 1, 1),
        width,
        dtype=torch.float32,
        device=rows.begins.device,
    )


def sum_partials(
    partials: Tensor, rows: RaggedRows, rows_per_block: int, dtype: torch.dtype
) -> Tensor:
    """Add up the slots of each expert.

    :param partials: What programs wrote. *Shape:* ``(slots,width)``.
    :param rows: The rows.
    :param rows_per_block: As for :func:`new_partials`.
    :param dtype: The type of the sums.

    :returns: The sums, 0 for an expert without a row. *Shape:* ``(E,width)``.
    """
    width = partials.size(1)
    out = partials.new_empty(rows.num_experts, width, dtype=dtype)
    _sum_up(partials, rows, rows_per_block, out, (width,))

    return out


def sum_partials_in_parts(
    partials: Tensor, rows: RaggedRows, rows_per_block: int, params: Sequence[Tensor]
) -> list[Tensor]:
    """Add up slots that have the sums for several parameters side by side.

    :param partials: What programs wrote. *Shape:* ``(slots,width)``.
    :param rows: The rows.
    :param rows_per_block: As for :func:`new_partials`.
    :param params: The parameters, in the order of their sums, of one type. *Shape:*
        ``([E,]…)`` each, ``E * width`` elements in all.

    :returns: The sums, each contiguous, and as its parameter.
    """
    sizes = [x.numel() for x in params]
    out = partials.new_empty(sum(sizes), dtype=params[0].dtype)
    widths = tuple(size // rows.num_experts for size in sizes)
    _sum_up(partials, rows, rows_per_block, out, widths)

    return [x.view(y.shape) for x, y in zip(out.split(sizes), params, strict=True)]


def _sum_up(
    partials: Tensor,
    rows: RaggedRows,
    rows_per_block: int,
    out: Tensor,
    widths: tuple[int, ...],
) -> None:
    width = partials.size(1)
    block_rows, block_cols = _NARROW if width < 2048 else _WIDE
    grid = (ceil_div(width, block_cols), rows.num_experts)
    _sum_partials_kernel[grid](
        *(partials, rows.begins, out, rows.num_seqs, width, rows_per_block),
        WIDTHS=widths,
        NUM_EXPERTS=rows.num_experts,
        BLOCK_ROWS=block_rows,
        BLOCK_COLS=block_cols,
    )


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def locate(begins, num_seqs, slot, ROWS: tl.constexpr, NUM_EXPERTS: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    """Tell whose rows a slot is for, and which: their first, and their end.

    A grid of as many programs as there are slots so has rows of one expert in each
    program; where there are none, the end is not after the first.
    """
    MASKED: tl.constexpr = triton.next_power_of_2(NUM_EXPERTS)
    experts = tl.arange(0, MASKED)
    is_expert = experts < NUM_EXPERTS
    ends = tl.load(begins + (experts + 1) * num_seqs, mask=is_expert, other=0)
    # The last slot of each expert, ascending
    lasts = (ends + ROWS - 1) // ROWS - 1 + experts
    expert = tl.sum((is_expert & (lasts < slot)).to(tl.int32), 0)

    block = slot - expert
    begin = tl.load(begins + expert * num_seqs)
    end = tl.load(begins + (expert + 1) * num_seqs)

    return expert, tl.maximum(begin, block * ROWS), tl.minimum(end, (block + 1) * ROWS)


@Launcher
@triton.jit  # type: ignore[untyped-decorator]  # as above
def _sum_partials_kernel(  # type: ignore[no-untyped-def]  # as above
    partials,
    begins,
    out,
    num_seqs,
    width,
    rows_per_block,
    WIDTHS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    expert = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    begin = tl.load(begins + expert * num_seqs)
    end = tl.load(begins + (expert + 1) * num_seqs)

    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    if end > begin:
        slot = begin // rows_per_block + expert
        last = (end - 1) // rows_per_block + expert
        # The interpreter takes no tensor as the end of a range.
        while slot <= last:
            slots = slot + tl.arange(0, BLOCK_ROWS)
            total += tl.load(
                partials + slots.to(tl.int64)[:, None] * width + cols[None, :],
                mask=(slots <= last)[:, None] & (cols < width)[None, :],
                other=0.0,
            )
            slot += BLOCK_ROWS

    # (E,width) of each part, one after the other
    at = cols
    first = 0
    for i in tl.static_range(len(WIDTHS)):
        shift = (NUM_EXPERTS - 1) * first + expert * WIDTHS[i]
        at = tl.where(cols >= first, cols + shift, at)
        first += WIDTHS[i]
    tl.store(out + at, tl.sum(total, 0).to(out.dtype.element_ty), mask=cols < width)
