"""Sums over the rows of each expert, in an order that is always the same.

A kernel whose program b reads the rows ``[b * R, (b + 1) * R)`` writes, for each expert
e that has rows among them, its sum of these to slot ``b + e``. As rows are sorted by
expert, no two programs write to the same slot. :func:`sum_partials` then adds up the
slots of each expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moxe_plugin.nn.ragged import RaggedRows

_BLOCK_ROWS = 64
_BLOCK_COLS = 32


def new_partials(rows: RaggedRows, rows_per_block: int, width: int) -> Tensor:
    """Create the slots.

    :param rows: The rows.
    :param rows_per_block: How many of them a program reads, R.
    :param width: The number of sums.

    :returns: Uninitialised float32. *Shape:* ``(slots,width)``.
    """
    num_blocks = triton.cdiv(rows.num_rows, rows_per_block)

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

    grid = (triton.cdiv(width, _BLOCK_COLS), rows.num_experts)
    _sum_kernel[grid](
        *(partials, rows.begins, out, rows.num_seqs, width, rows_per_block),
        BLOCK_ROWS=_BLOCK_ROWS,
        BLOCK_COLS=_BLOCK_COLS,
    )

    return out


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def _sum_kernel(  # type: ignore[no-untyped-def]  # as above
    partials,
    begins,
    out,
    num_seqs,
    width,
    rows_per_block,
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

    at = out + expert.to(tl.int64) * width + cols
    tl.store(at, tl.sum(total, 0).to(out.dtype.element_ty), mask=cols < width)
