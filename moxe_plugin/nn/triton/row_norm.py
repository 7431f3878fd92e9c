"""Layer normalisation of ragged rows per head, with the scale of each row's expert.

:class:`~moxe_plugin.nn.layers.ScaleNorm` as a Triton kernel for each direction; see
:mod:`moxe_plugin.nn.triton.row_norm_kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moxe_plugin.nn.ragged import RaggedRows
from moxe_plugin.nn.triton.partials import PartialSums
from moxe_plugin.nn.triton.row_norm_kernels import (
    norm_backward_kernel,
    norm_forward_kernel,
)
from moxe_plugin.nn.triton.sizes import ceil_div, power_of_two

_TILE_ROWS = 4
"""The rows of a tile."""

_ROWS_PER_BLOCK = 32
"""The rows that a program of the backward pass sums up."""

MAX_REGISTERS = 128
"""Those of a thread in the backward pass, of which 512 then share a multiprocessor.

Left to itself, the compiler takes so many that too few threads wait for memory.
"""


def norm_forward(
    flat: Tensor,
    weight: Tensor,
    rows: RaggedRows,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Normalise each head of each row, and scale it: ``norm(x) * weight``.

    Computed in float32.

    :param flat: With a last stride of 1. *Shape:* ``(C,M)``.
    :param weight: Contiguous. *Shape:* ``(E,M)``.
    :param rows: The rows.
    :param num_heads: The number of heads H, which divides M.
    :param eps: What the variance is increased by.

    :returns: The outputs, of the type of ``weight``, and the mean and the inverse
        standard deviation of each head in float32. *Shapes:* ``(C,M)`` and ``(2,C,H)``.
    """
    num_rows, width = flat.shape
    out = weight.new_empty(num_rows, width)
    stats = flat.new_empty(2, num_rows, num_heads, dtype=torch.float32)

    if num_rows > 0:
        head_dim = width // num_heads
        block_dim = power_of_two(head_dim)
        norm_forward_kernel[(ceil_div(num_rows, _TILE_ROWS) * num_heads,)](
            *(flat, weight, out, stats, rows.segment_of_row),
            *(num_rows, rows.num_seqs, flat.stride(0), num_heads, eps),
            HEAD_DIM=head_dim,
            BLOCK_DIM=block_dim,
            TILE_ROWS=_TILE_ROWS,
            num_warps=count_warps(block_dim),
        )

    return out, stats


def norm_backward(
    grad_out: Tensor,
    flat: Tensor,
    weight: Tensor,
    stats: Tensor,
    rows: RaggedRows,
    num_heads: int,
    sums: PartialSums,
    other_grad: Tensor | None = None,
) -> Tensor:
    """Compute the gradients of :func:`norm_forward`.

    :param grad_out: The gradient of the outputs, with a last stride of 1. *Shape:*
        ``(C,M)``.
    :param flat: As in :func:`norm_forward`.
    :param weight: As in :func:`norm_forward`.
    :param stats: What :func:`norm_forward` returned.
    :param rows: As in :func:`norm_forward`.
    :param num_heads: As in :func:`norm_forward`.
    :param sums: Gets the gradient of ``weight``.
    :param other_grad: The gradient that ``flat`` gets elsewhere, as from a residual
        connection around the norm, to which this one is added; with a last stride of 1.
        *Shape:* ``(C,M)``.

    :returns: The gradient of ``flat``, as this.
    """
    num_rows, width = flat.shape
    grad_flat = flat.new_empty(num_rows, width)
    partials = sums.new_slots(_ROWS_PER_BLOCK, (weight,))

    if num_rows > 0:
        head_dim = width // num_heads
        block_dim = power_of_two(head_dim)
        num_warps = count_warps(block_dim)
        norm_backward_kernel[(ceil_div(num_rows, _ROWS_PER_BLOCK) * num_heads,)](
            *(grad_out, flat, weight, stats),
            grad_out if other_grad is None else other_grad,
            *(grad_flat, partials, rows.segment_of_row, rows.begins),
            *(num_rows, rows.num_seqs, grad_out.stride(0), flat.stride(0)),
            0 if other_grad is None else other_grad.stride(0),
            num_heads,
            HAS_OTHER=other_grad is not None,
            HEAD_DIM=head_dim,
            BLOCK_DIM=block_dim,
            # More rows pay where warps must wait for each other, but take registers.
            TILE_ROWS=_TILE_ROWS if num_warps > 1 else _TILE_ROWS // 2,
            ROWS_PER_BLOCK=_ROWS_PER_BLOCK,
            num_warps=num_warps,
            maxnreg=MAX_REGISTERS,
        )

    return grad_flat


def count_warps(block_dim: int) -> int:
    """Tell how many warps read a row if each thread reads eight channels of it.

    :param block_dim: The channels of a tile.

    :returns: A power of two from 1 to 8.
    """
    return min(max(block_dim // 256, 1), 8)
