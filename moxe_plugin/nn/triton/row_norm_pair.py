"""What the sLSTM block does between its cell and its feed-forward network, on rows.

``x2 = x + norm_per_head(cell) * w1;  n = norm(x2) * w2``, as a Triton kernel for each
direction, which reads and writes each row once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moxe_plugin.nn.ragged import RaggedRows
from moxe_plugin.nn.triton.partials import PartialSums
from moxe_plugin.nn.triton.row_norm import MAX_REGISTERS, count_warps
from moxe_plugin.nn.triton.row_norm_pair_kernels import (
    norm_pair_backward_kernel,
    norm_pair_forward_kernel,
)
from moxe_plugin.nn.triton.sizes import ceil_div, power_of_two

_TILE_ROWS = 2
"""The rows of a tile."""

_ROWS_PER_BLOCK = 32
"""The rows that a program of the backward pass sums up."""


class NormPairGrads(NamedTuple):
    """The gradients of what :func:`norm_pair_forward` reads rows of, as these."""

    flat: Tensor
    residual: Tensor


def norm_pair_forward(
    flat: Tensor,
    weight: Tensor,
    residual: Tensor,
    next_weight: Tensor,
    rows: RaggedRows,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add a norm per head to a residual, and normalise the sum over its whole width.

    Computed in float32, the second norm of the sum as it is returned.

    :param flat: What is normalised per head; its last stride is 1. *Shape:* ``(C,M)``.
    :param weight: The first norm's scale, contiguous. *Shape:* ``(E,M)``.
    :param residual: Its last stride is 1. *Shape:* ``(C,M)``.
    :param next_weight: The second norm's scale, contiguous. *Shape:* ``(E,M)``.
    :param rows: The rows.
    :param num_heads: The number of heads H of the first norm, which divides M.
    :param eps: What variances are increased by.

    :returns: The sum, of the type of ``residual``, and its norm, of that of
        ``next_weight``; and the mean and the inverse standard deviation of each head
        and, last, of the sum, in float32. *Shapes:* ``(C,M)`` twice, and ``(2,C,H+1)``.
    """
    num_rows, width = flat.shape
    summed = residual.new_empty(num_rows, width)
    normed_sum = next_weight.new_empty(num_rows, width)
    stats = flat.new_empty(2, num_rows, num_heads + 1, dtype=torch.float32)

    if num_rows > 0:
        head_dim = width // num_heads
        block_heads = power_of_two(num_heads)
        block_dim = power_of_two(head_dim)
        norm_pair_forward_kernel[(ceil_div(num_rows, _TILE_ROWS),)](
            *(flat, weight, residual, next_weight, summed, normed_sum, stats),
            *(rows.segment_of_row, num_rows, rows.num_seqs),
            *(flat.stride(0), residual.stride(0), eps),
            NUM_HEADS=num_heads,
            BLOCK_HEADS=block_heads,
            HEAD_DIM=head_dim,
            BLOCK_DIM=block_dim,
            TILE_ROWS=_TILE_ROWS,
            num_warps=count_warps(block_heads * block_dim),
        )

    return summed, normed_sum, stats


def norm_pair_backward(
    grad_summed: Tensor,
    grad_normed_sum: Tensor,
    flat: Tensor,
    weight: Tensor,
    summed: Tensor,
    next_weight: Tensor,
    stats: Tensor,
    rows: RaggedRows,
    num_heads: int,
    sums: PartialSums,
) -> NormPairGrads:
    """Compute the gradients of :func:`norm_pair_forward`.

    :param grad_summed: The gradient of the sum, with a last stride of 1. *Shape:*
        ``(C,M)``.
    :param grad_normed_sum: The gradient of its norm, with a last stride of 1. *Shape:*
        ``(C,M)``.
    :param flat: As in :func:`norm_pair_forward`.
    :param weight: As in :func:`norm_pair_forward`.
    :param summed: The sum that :func:`norm_pair_forward` returned.
    :param next_weight: As in :func:`norm_pair_forward`.
    :param stats: What :func:`norm_pair_forward` returned.
    :param rows: As in :func:`norm_pair_forward`.
    :param num_heads: As in :func:`norm_pair_forward`.
    :param sums: Gets the gradients of ``weight`` and ``next_weight``.

    :returns: The gradients.
    """
    num_rows, width = flat.shape
    grad_flat = flat.new_empty(num_rows, width)
    grad_residual = summed.new_empty(num_rows, width)
    partials = sums.new_slots(_ROWS_PER_BLOCK, (weight, next_weight))

    if num_rows > 0:
        head_dim = width // num_heads
        block_heads = power_of_two(num_heads)
        block_dim = power_of_two(head_dim)
        norm_pair_backward_kernel[(ceil_div(num_rows, _ROWS_PER_BLOCK),)](
            *(grad_summed, grad_normed_sum, flat, weight, summed, next_weight, stats),
            *(grad_flat, grad_residual, partials, rows.segment_of_row, rows.begins),
            *(num_rows, rows.num_seqs, grad_summed.stride(0)),
            *(grad_normed_sum.stride(0), flat.stride(0)),
            NUM_HEADS=num_heads,
            BLOCK_HEADS=block_heads,
            HEAD_DIM=head_dim,
            BLOCK_DIM=block_dim,
            TILE_ROWS=_TILE_ROWS,
            ROWS_PER_BLOCK=_ROWS_PER_BLOCK,
            num_warps=count_warps(block_heads * block_dim),
            maxnreg=MAX_REGISTERS,
        )

    return NormPairGrads(grad_flat, grad_residual)
