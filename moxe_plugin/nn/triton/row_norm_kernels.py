"""The kernels of :mod:`moxe_plugin.nn.triton.row_norm`, and what others share with it.

A program has one head of a few rows, so that it reads them once. Where sums over the
rows of an expert are wanted, it takes one expert after the other: nearly always its
rows are of a single one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moxe_plugin.nn.triton.launching import Launcher


@triton.jit
def load_rows(x, row, stride, col, mask):  # type: ignore[no-untyped-def]  # Triton has no types
    """Read channels `col` of the rows `row` of `x` as float32; 0 where masked."""
    at = x + row.to(tl.int64)[:, None] * stride + col[None, :]

    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_rows(x, value, row, stride, col, mask):  # type: ignore[no-untyped-def]  # as above
    """Write what :func:`load_rows` reads."""
    at = x + row.to(tl.int64)[:, None] * stride + col[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def load_scale(weight, expert, width, col, mask):  # type: ignore[no-untyped-def]  # as above
    """Read channels `col` of an expert's weight as float32; 0 where masked."""
    at = weight + expert * width + col

    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def standardize(x, mask, eps, DIM: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    """Give ``(x - mean) * rstd``, mean and rstd of the last axis; 0 where masked."""
    mean = tl.sum(x, -1) / DIM
    # Masked channels must not count in the variance.
    centered = tl.where(mask, x - tl.expand_dims(mean, -1), 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centered * centered, -1) / DIM + eps)

    return centered * tl.expand_dims(rstd, -1), mean, rstd


@triton.jit
def store_stats(stats, mean, rstd, row, num_rows, head, num_heads, is_row):  # type: ignore[no-untyped-def]  # as above
    """Write mean and rstd of a head to ``stats``, ``(2,C,H)``."""
    at = stats + row.to(tl.int64) * num_heads + head
    tl.store(at, mean, mask=is_row)
    tl.store(at + num_rows.to(tl.int64) * num_heads, rstd, mask=is_row)


@triton.jit
def standardize_again(x, stats, row, num_rows, head, num_heads, is_row):  # type: ignore[no-untyped-def]  # as above
    """Give ``(x - mean) * rstd``, and rstd, from ``stats``."""
    at = stats + row.to(tl.int64) * num_heads + head
    mean = tl.load(at, mask=is_row, other=0.0)
    at += num_rows.to(tl.int64) * num_heads
    rstd = tl.load(at, mask=is_row, other=0.0)

    return (x - mean[:, None]) * rstd[:, None], rstd


@triton.jit  # type: ignore[untyped-decorator]  # as above
def norm_gradient(grad, normed, rstd, DIM: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    """Give the gradient of x for that of ``normed``, which is 0 where masked."""
    mean_grad = tl.sum(grad, -1) / DIM
    mean_product = tl.sum(grad * normed, -1) / DIM
    centered = grad - tl.expand_dims(mean_grad, -1)
    centered -= normed * tl.expand_dims(mean_product, -1)

    return centered * tl.expand_dims(rstd, -1)


@triton.jit
def find_experts(segment_of_row, num_seqs, first, end):  # type: ignore[no-untyped-def]  # as above
    """Give the first and the last expert of the rows from `first` to before `end`."""
    return (
        tl.load(segment_of_row + first) // num_seqs,
        tl.load(segment_of_row + end - 1) // num_seqs,
    )


@triton.jit
def clip_to_expert(begins, num_seqs, expert, first, end):  # type: ignore[no-untyped-def]  # as above
    """Give where, from `first` to `end`, the rows of an expert begin and end."""
    return (
        tl.maximum(tl.load(begins + expert * num_seqs), first),
        tl.minimum(tl.load(begins + (expert + 1) * num_seqs), end),
    )


# A new number of rows must not compile a kernel again.
@Launcher
@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]  # as above
def norm_forward_kernel(  # type: ignore[no-untyped-def]  # as above
    flat,
    weight,
    out,
    stats,
    segment_of_row,
    num_rows,
    num_seqs,
    flat_stride,
    num_heads,
    eps,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Normalise a tile of rows of one head."""
    # The heads of a row run side by side.
    head = tl.program_id(0) % num_heads
    row = tl.program_id(0) // num_heads * TILE_ROWS + tl.arange(0, TILE_ROWS)
    is_row = row < num_rows
    channel = tl.arange(0, BLOCK_DIM)
    col = head * HEAD_DIM + channel
    mask = is_row[:, None] & (channel < HEAD_DIM)[None, :]
    width = num_heads * HEAD_DIM

    x = load_rows(flat, row, flat_stride, col, mask)
    expert = tl.load(segment_of_row + row, mask=is_row, other=0) // num_seqs
    scale = load_rows(weight, expert, width, col, mask)

    normed, mean, rstd = standardize(x, mask, eps, HEAD_DIM)

    store_rows(out, normed * scale, row, width, col, mask)
    store_stats(stats, mean, rstd, row, num_rows, head, num_heads, is_row)


@Launcher
@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]  # as above
def norm_backward_kernel(  # type: ignore[no-untyped-def]  # as above
    grad_out,
    flat,
    weight,
    stats,
    other_grad,
    grad_flat,
    partials,
    segment_of_row,
    begins,
    num_rows,
    num_seqs,
    grad_stride,
    flat_stride,
    other_stride,
    num_heads,
    HAS_OTHER: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    ROWS_PER_BLOCK: tl.constexpr,
):
    """Differentiate a block of rows of one head, tile by tile."""
    head = tl.program_id(0) % num_heads
    block = tl.program_id(0) // num_heads
    first = block * ROWS_PER_BLOCK
    end = tl.minimum(first + ROWS_PER_BLOCK, num_rows)
    channel = tl.arange(0, BLOCK_DIM)
    is_channel = channel < HEAD_DIM
    col = head * HEAD_DIM + channel
    width = num_heads * HEAD_DIM

    expert, last_expert = find_experts(segment_of_row, num_seqs, first, end)
    while expert <= last_expert:
        row_0, expert_end = clip_to_expert(begins, num_seqs, expert, first, end)
        scale = load_scale(weight, expert, width, col, is_channel)
        grad_scale = tl.zeros((BLOCK_DIM,), tl.float32)

        while row_0 < expert_end:
            row = row_0 + tl.arange(0, TILE_ROWS)
            is_row = row < expert_end
            mask = is_row[:, None] & is_channel[None, :]

            x = load_rows(flat, row, flat_stride, col, mask)
            grad = load_rows(grad_out, row, grad_stride, col, mask)
            normed, rstd = standardize_again(
                x, stats, row, num_rows, head, num_heads, is_row
            )

            grad_scale += tl.sum(grad * normed, 0)
            grad_x = norm_gradient(grad * scale[None, :], normed, rstd, HEAD_DIM)
            if HAS_OTHER:
                grad_x += load_rows(other_grad, row, other_stride, col, mask)
            store_rows(grad_flat, grad_x, row, width, col, mask)
            row_0 += TILE_ROWS

        at = partials + (block + expert).to(tl.int64) * width + col
        tl.store(at, grad_scale, mask=is_channel)
        expert += 1
