"""The products of the sLSTM block's heads, on ragged rows, as one Triton kernel each.

::

    gates_if = u W_if;  gates_zo = x W_zo

for each head, where u is what the convolution gives and x what it is given. Each tensor
of rows is read and written once; weights stay in the second-level cache.

Without gradients: the autograd function of the block calls these.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from moxe_plugin.nn.ragged import RaggedRows
from moxe_plugin.nn.triton.head_products_kernels import (
    gate_products_grad_kernel,
    gate_products_kernel,
    gate_weight_grads_kernel,
)
from moxe_plugin.nn.triton.partials import PartialSums
from moxe_plugin.nn.triton.sizes import ceil_div, split_head_dim
from moxe_plugin.nn.triton.tile_products import find_precision, is_interpreted

_ROWS: Final = 128
"""Rows of a program that writes rows."""

_RUN: Final = 2048
"""How many rows a program sums up: one for each multiprocessor, of 16,384 rows."""


def gate_products(
    convolved: Tensor, normed: Tensor, gate_proj: Tensor, rows: RaggedRows
) -> Tensor:
    """Multiply each head of each row by its gates' weight of the row's expert.

    :param convolved: What i and f see, contiguous. *Shape:* ``(C,H*D)``.
    :param normed: What z and o see, contiguous. *Shape:* ``(C,H*D)``.
    :param gate_proj: Input first; gates i, f, z and o; contiguous, of the type of the
        rows. *Shape:* ``(E,H,D,4,D)``.
    :param rows: Where rows stand.

    :returns: The gates i and f, and z and o. *Shape:* ``(2,C,H*2*D)``.

    :raises ValueError: D is neither a power of two nor the sum of two, from 16 on.
    """
    num_rows, width = convolved.shape
    gates = convolved.new_empty(2, num_rows, 2 * width)
    _launch(
        gate_products_kernel, rows, gate_proj, (convolved, normed, gate_proj), *gates
    )

    return gates


def gate_products_backward(
    grad_gates: Tensor, gate_proj: Tensor, rows: RaggedRows
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of what :func:`gate_products` is given.

    :param grad_gates: Contiguous. *Shape:* ``(2,C,H*2*D)``.
    :param gate_proj: As there.
    :param rows: As there.

    :returns: Those of ``convolved`` and ``normed``. *Shape:* ``(C,H*D)`` each.

    :raises ValueError: As there.
    """
    _, num_rows, width = grad_gates.shape
    grad_convolved = grad_gates.new_empty(num_rows, width // 2)
    grad_normed = torch.empty_like(grad_convolved)
    _launch(
        *(gate_products_grad_kernel, rows, gate_proj, (*grad_gates, gate_proj)),
        *(grad_convolved, grad_normed),
    )

    return grad_convolved, grad_normed


def gate_weight_grads(
    before: Tensor,
    convolved: Tensor,
    normed: Tensor,
    grad_gates: Tensor,
    like: Tensor,
    rows: RaggedRows,
    sums: PartialSums,
) -> None:
    """Compute the gradients of both weights of the gates.

    :param before: What the recurrent weight was multiplied with, contiguous; all four
        gates see it. *Shape:* ``(C,H*D)``.
    :param convolved: As for :func:`gate_products`.
    :param normed: As there.
    :param grad_gates: Contiguous. *Shape:* ``(2,C,H*2*D)``.
    :param like: A weight. *Shape:* ``(E,H,D,4,D)``.
    :param rows: Where rows stand.
    :param sums: Gets the gradients of the recurrent weight and of ``gate_proj``.
        *Shape:* ``(E,H,D,4,D)`` each.

    :raises ValueError: As for :func:`gate_products`.
    """
    num_heads, head_dim = like.shape[1:3]
    partials = sums.new_slots(_RUN, (like, like))

    if rows.num_rows > 0:
        is_wide = before.dtype == torch.float32
        gate_weight_grads_kernel[(4 * num_heads, partials.size(0))](
            *(before, convolved, normed, *grad_gates, rows.begins, partials),
            rows.num_seqs,
            **_sizes(like, before.dtype),
            NUM_EXPERTS=rows.num_experts,
            RUN=_RUN,
            ROWS=16 if is_wide else 32,
            # Fewer threads have no registers for the sums.
            num_warps=8 if head_dim > 64 else 4,
            num_stages=1 if is_wide else 6,
        )


def _launch(
    kernel: Any,
    rows: RaggedRows,
    weight: Tensor,
    sources: tuple[Tensor, Tensor, Tensor],
    *outs: Tensor,
) -> None:
    if rows.num_rows == 0:
        return

    num_heads, head_dim = weight.shape[1:3]
    is_wide = weight.dtype == torch.float32
    block_rows = 32 if is_wide else _ROWS
    num_slots = ceil_div(rows.num_rows, block_rows) + rows.num_experts - 1
    kernel[(2 * num_heads, num_slots)](
        *(*sources, rows.begins, *outs, rows.num_seqs),
        **_sizes(weight, weight.dtype),
        NUM_EXPERTS=rows.num_experts,
        ROWS=block_rows,
        # The largest power of 2 that divides 2D
        COLS=min(2 * head_dim & -(2 * head_dim), 32 if is_wide else 64),
        num_warps=8,
        num_stages=2 if kernel is gate_products_kernel else 3,
        # A multiprocessor then has room for two programs of Table 1, as its shared
        # memory has with these stages.
        maxnreg=128,
    )


def _sizes(weight: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    num_heads, head_dim = weight.shape[1:3]
    parts = split_head_dim(head_dim)

    if parts is None:
        raise ValueError(
            "The weights must have heads of a power of two or the sum of two, from 16 "
            f"on, but have heads of {head_dim} instead."
        )

    return {
        "H": num_heads,
        "D": head_dim,
        "P": parts[0],
        "Q": parts[1],
        "INTERPRETED": is_interpreted(),
        "PRECISION": find_precision(dtype),
    }
