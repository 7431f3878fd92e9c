"""The kernels of :mod:`moxe_plugin.nn.triton.row_norm_pair`.

A program has whole rows, in tiles ``(H,R,D)`` of heads, rows, and channels of a head.
Heads come first as Triton then gives each warp heads of all rows, and not rows: sums
over rows stay within a thread.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moxe_plugin.nn.triton.launching import Launcher
from moxe_plugin.nn.triton.row_norm_kernels import (
    clip_to_expert,
    find_experts,
    load_scale,
    norm_gradient,
    standardize,
)


@triton.jit
def _load(x, row, stride, col, mask):  # type: ignore[no-untyped-def]  # Triton has no types
    at = x + row.to(tl.int64)[None, :, None] * stride + col[:, None, :]

    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(x, value, row, stride, col, mask):  # type: ignore[no-untyped-def]  # as above
    at = x + row.to(tl.int64)[None, :, None] * stride + col[:, None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _row_mean(x, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    return (tl.sum(tl.sum(x, 2), 0) / WIDTH)[None, :, None]


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _standardize_again(  # type: ignore[no-untyped-def]  # as above
    x, stats, row, num_rows, head, mask, NUM_HEADS: tl.constexpr
):
    at = stats + row.to(tl.int64)[None, :] * (NUM_HEADS + 1) + head
    mean = tl.load(at, mask=mask, other=0.0)[:, :, None]
    at += num_rows.to(tl.int64) * (NUM_HEADS + 1)
    rstd = tl.load(at, mask=mask, other=0.0)

    return (x - mean) * rstd[:, :, None], rstd


@Launcher
@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]  # as above
def norm_pair_forward_kernel(  # type: ignore[no-untyped-def]  # as above
    flat,
    weight,
    residual,
    next_weight,
    summed,
    normed_sum,
    stats,
    segment_of_row,
    num_rows,
    num_seqs,
    flat_stride,
    residual_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Compute a tile of rows."""
    width: tl.constexpr = NUM_HEADS * HEAD_DIM
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    is_row = row < num_rows
    head = tl.arange(0, BLOCK_HEADS)
    channel = tl.arange(0, BLOCK_DIM)
    col = head[:, None] * HEAD_DIM + channel[None, :]
    is_head = (head < NUM_HEADS)[:, None] & is_row[None, :]
    mask = is_head[:, :, None] & (channel < HEAD_DIM)[None, None, :]
    expert = tl.load(segment_of_row + row, mask=is_row, other=0) // num_seqs

    x = _load(flat, row, flat_stride, col, mask)
    y = _load(residual, row, residual_stride, col, mask)
    normed, mean, rstd = standardize(x, mask, eps, HEAD_DIM)
    y += normed * _load(weight, expert, width, col, mask)
    _store(summed, y, row, width, col, mask)

    # The backward pass reads what is stored.
    y = y.to(summed.dtype.element_ty).to(tl.float32)
    sum_mean = _row_mean(y, width)
    centered = tl.where(mask, y - sum_mean, 0.0)
    sum_rstd = 1.0 / tl.sqrt(_row_mean(centered * centered, width) + eps)
    y = centered * sum_rstd * _load(next_weight, expert, width, col, mask)
    _store(normed_sum, y, row, width, col, mask)

    # Of each row the heads' and then the sum's
    at = stats + row.to(tl.int64)[None, :] * (NUM_HEADS + 1) + head[:, None]
    offset = num_rows.to(tl.int64) * (NUM_HEADS + 1)
    tl.store(at, mean, mask=is_head)
    tl.store(at + offset, rstd, mask=is_head)
    at = stats + (row.to(tl.int64) * (NUM_HEADS + 1) + NUM_HEADS)[None, :, None]
    tl.store(at, sum_mean, mask=is_row[None, :, None])
    tl.store(at + offset, sum_rstd, mask=is_row[None, :, None])


@Launcher
@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]  # as above
def norm_pair_backward_kernel(  # type: ignore[no-untyped-def]  # as above
    grad_summed,
    grad_normed_sum,
    flat,
    weight,
    summed,
    next_weight,
    stats,
    grad_flat,
    grad_residual,
    partials,
    segment_of_row,
    begins,
    num_rows,
    num_seqs,
    grad_summed_stride,
    grad_normed_sum_stride,
    flat_stride,
    NUM_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    ROWS_PER_BLOCK: tl.constexpr,
):
    """Differentiate a block of rows, tile by tile."""
    width: tl.constexpr = NUM_HEADS * HEAD_DIM
    block = tl.program_id(0)
    first = block * ROWS_PER_BLOCK
    end = tl.minimum(first + ROWS_PER_BLOCK, num_rows)
    head = tl.arange(0, BLOCK_HEADS)
    channel = tl.arange(0, BLOCK_DIM)
    col = head[:, None] * HEAD_DIM + channel[None, :]
    is_head = (head < NUM_HEADS)[:, None]
    is_col = is_head & (channel < HEAD_DIM)[None, :]

    expert, last_expert = find_experts(segment_of_row, num_seqs, first, end)
    while expert <= last_expert:
        row_0, expert_end = clip_to_expert(begins, num_seqs, expert, first, end)
        scale = load_scale(weight, expert, width, col, is_col)[:, None, :]
        next_scale = load_scale(next_weight, expert, width, col, is_col)[:, None, :]
        grad_scale = tl.zeros((BLOCK_HEADS, BLOCK_DIM), tl.float32)
        grad_next_scale = tl.zeros((BLOCK_HEADS, BLOCK_DIM), tl.float32)

        while row_0 < expert_end:
            row = row_0 + tl.arange(0, TILE_ROWS)
            is_row = (row < expert_end)[None, :]
            mask = is_row[:, :, None] & is_col[:, None, :]

            # Back through the norm of the sum
            grad = _load(grad_normed_sum, row, grad_normed_sum_stride, col, mask)
            y = _load(summed, row, width, col, mask)
            y, rstd = _standardize_again(
                y, stats, row, num_rows, NUM_HEADS, is_row, NUM_HEADS
            )
            grad_next_scale += tl.sum(grad * y, 1)
            grad *= next_scale
            grad -= _row_mean(grad, width) + y * _row_mean(grad * y, width)
            grad *= rstd[:, :, None]
            grad += _load(grad_summed, row, grad_summed_stride, col, mask)
            _store(grad_residual, grad, row, width, col, mask)

            # Back through the norm per head
            x = _load(flat, row, flat_stride, col, mask)
            x, rstd = _standardize_again(
                x, stats, row, num_rows, head[:, None], is_head & is_row, NUM_HEADS
            )
            grad_scale += tl.sum(grad * x, 1)
            grad = norm_gradient(grad * scale, x, rstd, HEAD_DIM)
            _store(grad_flat, grad, row, width, col, mask)
            row_0 += TILE_ROWS

        at = partials + (block + expert).to(tl.int64) * 2 * width
        tl.store(at + col, grad_scale, mask=is_col)
        tl.store(at + width + col, grad_next_scale, mask=is_col)
        expert += 1
