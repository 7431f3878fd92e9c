"""The kernels of :mod:`moxe_plugin.nn.triton.row_gated_norm`."""

from __future__ import annotations

import triton
import triton.language as tl

from moxe_plugin.nn.triton.launching import Launcher
from moxe_plugin.nn.triton.row_norm_kernels import (
    clip_to_expert,
    find_experts,
    load_rows,
    load_scale,
    norm_gradient,
    standardize,
    standardize_again,
    store_rows,
    store_stats,
)


@Launcher
@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]  # Triton has no annotations
def gated_norm_forward_kernel(  # type: ignore[no-untyped-def]  # as above
    hidden,
    convolved,
    gate,
    norm_weight,
    skip,
    out,
    stats,
    segment_of_row,
    num_rows,
    num_seqs,
    hidden_stride,
    convolved_stride,
    gate_stride,
    num_heads,
    eps,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Compute a tile of rows of one head."""
    # The heads of a row run side by side.
    head = tl.program_id(0) % num_heads
    row = tl.program_id(0) // num_heads * TILE_ROWS + tl.arange(0, TILE_ROWS)
    is_row = row < num_rows
    channel = tl.arange(0, BLOCK_DIM)
    col = head * HEAD_DIM + channel
    mask = is_row[:, None] & (channel < HEAD_DIM)[None, :]
    width = num_heads * HEAD_DIM

    x = load_rows(hidden, row, hidden_stride, col, mask)
    u = load_rows(convolved, row, convolved_stride, col, mask)
    z = load_rows(gate, row, gate_stride, col, mask)
    expert = tl.load(segment_of_row + row, mask=is_row, other=0) // num_seqs
    norm_scale = load_rows(norm_weight, expert, width, col, mask)
    skip_scale = load_rows(skip, expert, width, col, mask)

    normed, mean, rstd = standardize(x, mask, eps, HEAD_DIM)
    y = (normed * norm_scale + skip_scale * u) * z * tl.sigmoid(z)

    store_rows(out, y, row, width, col, mask)
    store_stats(stats, mean, rstd, row, num_rows, head, num_heads, is_row)


@Launcher
@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]  # as above
def gated_norm_backward_kernel(  # type: ignore[no-untyped-def]  # as above
    grad_out,
    hidden,
    convolved,
    gate,
    norm_weight,
    skip,
    stats,
    grad_hidden,
    grad_convolved,
    grad_gate,
    partials,
    segment_of_row,
    begins,
    num_rows,
    num_seqs,
    grad_stride,
    hidden_stride,
    convolved_stride,
    gate_stride,
    grad_gate_stride,
    num_heads,
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
        norm_scale = load_scale(norm_weight, expert, width, col, is_channel)[None, :]
        skip_scale = load_scale(skip, expert, width, col, is_channel)[None, :]
        grad_norm_scale = tl.zeros((BLOCK_DIM,), tl.float32)
        grad_skip_scale = tl.zeros((BLOCK_DIM,), tl.float32)

        while row_0 < expert_end:
            row = row_0 + tl.arange(0, TILE_ROWS)
            is_row = row < expert_end
            mask = is_row[:, None] & is_channel[None, :]

            grad = load_rows(grad_out, row, grad_stride, col, mask)
            x = load_rows(hidden, row, hidden_stride, col, mask)
            u = load_rows(convolved, row, convolved_stride, col, mask)
            z = load_rows(gate, row, gate_stride, col, mask)
            normed, rstd = standardize_again(
                x, stats, row, num_rows, head, num_heads, is_row
            )

            # silu'(z) = sigmoid(z) * (1 + z * (1 - sigmoid(z)))
            opened = tl.sigmoid(z)
            grad_z = grad * opened * (1.0 + z * (1.0 - opened))
            grad_z *= normed * norm_scale + skip_scale * u
            store_rows(grad_gate, grad_z, row, grad_gate_stride, col, mask)

            # That of the sum that the gate multiplies
            grad *= z * opened
            store_rows(grad_convolved, grad * skip_scale, row, width, col, mask)
            grad_skip_scale += tl.sum(grad * u, 0)
            grad_norm_scale += tl.sum(grad * normed, 0)
            grad_x = norm_gradient(grad * norm_scale, normed, rstd, HEAD_DIM)
            store_rows(grad_hidden, grad_x, row, width, col, mask)
            row_0 += TILE_ROWS

        at = partials + (block + expert).to(tl.int64) * 2 * width + col
        tl.store(at, grad_norm_scale, mask=is_channel)
        tl.store(at + width, grad_skip_scale, mask=is_channel)
        expert += 1
