"""What the mLSTM block does between its cell and its down-projection, on ragged rows.

``(norm(hidden) * norm_weight + skip * convolved) * silu(gate)`` with a norm per head,
as a Triton kernel for each direction.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moxe_plugin.nn.ragged import RaggedRows
from moxe_plugin.nn.triton.partials import PartialSums
from moxe_plugin.nn.triton.row_gated_norm_kernels import (
    gated_norm_backward_kernel,
    gated_norm_forward_kernel,
)
from moxe_plugin.nn.triton.row_norm import MAX_REGISTERS, count_warps
from moxe_plugin.nn.triton.sizes import ceil_div, power_of_two

_FORWARD_TILE_ROWS = 4
"""The rows of a tile."""

_BACKWARD_TILE_ROWS = 2
"""Fewer, as the backward pass holds more of each row in registers."""

_ROWS_PER_BLOCK = 32
"""The rows that a program of the backward pass sums up."""


class GatedNormInputs(NamedTuple):
    """What is normalised, added and multiplied; the last stride of each is 1."""

    hidden: Tensor
    """What the cell gives. *Shape:* ``(C,I)``."""

    convolved: Tensor
    """What passes the cell by. *Shape:* ``(C,I)``."""

    gate: Tensor
    """The gate before its SiLU. *Shape:* ``(C,I)``."""

    norm_weight: Tensor
    """The norm's scale; contiguous. *Shape:* ``(E,I)``."""

    skip: Tensor
    """The scale of ``convolved``; contiguous. *Shape:* ``(E,I)``."""


class GatedNormGrads(NamedTuple):
    """The gradients of those of :class:`GatedNormInputs` that have rows, as these."""

    hidden: Tensor
    convolved: Tensor
    gate: Tensor


def gated_norm_forward(
    inputs: GatedNormInputs, rows: RaggedRows, num_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute ``(norm(hidden) * norm_weight + skip * convolved) * silu(gate)``.

    Computed in float32.

    :param inputs: The inputs.
    :param rows: The rows.
    :param num_heads: The number of heads H that are normalised separately; divides I.
    :param eps: What the variance is increased by.

    :returns: The outputs, of the type of the gate, and the mean and the inverse
        standard deviation of each head in float32. *Shapes:* ``(C,I)`` and ``(2,C,H)``.
    """
    hidden, convolved, gate, norm_weight, skip = inputs
    num_rows, width = hidden.shape
    out = gate.new_empty(num_rows, width)
    stats = gate.new_empty(2, num_rows, num_heads, dtype=torch.float32)

    if num_rows > 0:
        head_dim = width // num_heads
        block_dim = power_of_two(head_dim)
        num_tiles = ceil_div(num_rows, _FORWARD_TILE_ROWS)
        gated_norm_forward_kernel[(num_tiles * num_heads,)](
            *(hidden, convolved, gate, norm_weight, skip, out, stats),
            *(rows.segment_of_row, num_rows, rows.num_seqs, hidden.stride(0)),
            *(convolved.stride(0), gate.stride(0), num_heads, eps),
            HEAD_DIM=head_dim,
            BLOCK_DIM=block_dim,
            TILE_ROWS=_FORWARD_TILE_ROWS,
            num_warps=count_warps(block_dim),
        )

    return out, stats


def gated_norm_backward(
    grad_out: Tensor,
    inputs: GatedNormInputs,
    stats: Tensor,
    rows: RaggedRows,
    num_heads: int,
    sums: PartialSums,
    grad_gate: Tensor | None = None,
) -> GatedNormGrads:
    """Compute the gradients of :func:`gated_norm_forward`.

    :param grad_out: The gradient of the outputs, with a last stride of 1. *Shape:*
        ``(C,I)``.
    :param inputs: As in :func:`gated_norm_forward`.
    :param stats: What :func:`gated_norm_forward` returned.
    :param rows: As in :func:`gated_norm_forward`.
    :param num_heads: As in :func:`gated_norm_forward`.
    :param sums: Gets the gradients of the norm's weight and of the skip.
    :param grad_gate: Gets the gradient of the gate, with a last stride of 1, as the
        half of a wider tensor; a new tensor if ``None``. *Shape:* ``(C,I)``.

    :returns: The gradients.
    """
    hidden, convolved, gate, norm_weight, skip = inputs
    num_rows, width = hidden.shape
    grad_hidden = hidden.new_empty(num_rows, width)
    grad_convolved = convolved.new_empty(num_rows, width)
    if grad_gate is None:
        grad_gate = gate.new_empty(num_rows, width)
    partials = sums.new_slots(_ROWS_PER_BLOCK, (norm_weight, skip))

    if num_rows > 0:
        head_dim = width // num_heads
        block_dim = power_of_two(head_dim)
        gated_norm_backward_kernel[(ceil_div(num_rows, _ROWS_PER_BLOCK) * num_heads,)](
            *(grad_out, hidden, convolved, gate, norm_weight, skip, stats),
            *(grad_hidden, grad_convolved, grad_gate, partials),
            *(rows.segment_of_row, rows.begins, num_rows, rows.num_seqs),
            *(grad_out.stride(0), hidden.stride(0), convolved.stride(0)),
            *(gate.stride(0), grad_gate.stride(0), num_heads),
            HEAD_DIM=head_dim,
            BLOCK_DIM=block_dim,
            TILE_ROWS=_BACKWARD_TILE_ROWS,
            ROWS_PER_BLOCK=_ROWS_PER_BLOCK,
            num_warps=count_warps(block_dim),
            maxnreg=MAX_REGISTERS,
        )

    return GatedNormGrads(grad_hidden, grad_convolved, grad_gate)
