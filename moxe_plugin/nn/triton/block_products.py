"""q, k, v and the gates of the mLSTM block, as one Triton kernel each way.

::

    q, k = head_wise(u);  v = head_wise(a)
    i, f = [q, k, v] W_i + b_i, [q, k, v] W_f + b_f

of rows that are sorted by expert, without padding. Forward, u and a are read and q, k
and v are written once. Backward, the gradients of q, k and v and u and a are read and
those of u and a are written once; what comes back through the gates is never stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moxe_plugin.nn.ragged import RaggedRows
from moxe_plugin.nn.triton.block_products_kernels import (
    cell_inputs_backward_kernel,
    cell_inputs_forward_kernel,
)
from moxe_plugin.nn.triton.partials import PartialSums
from moxe_plugin.nn.triton.sizes import ceil_div, power_of_two
from moxe_plugin.nn.triton.tile_products import find_precision, is_interpreted

_MAX_BLOCK = 64
_ROWS = 64
"""Rows of a tile, and of a program of the forward kernel. Backward, half as many: that
leaves shared memory for a second program (on an H200, 220 instead of 250 us)."""

_RUN = 512
"""How many rows a program of the backward kernel sums up."""


class CellWeights(NamedTuple):
    """The parameters, contiguous; without E for a block that is no bank."""

    q: Tensor
    """*Shape:* ``([E,]G,B,B)``, as ``k`` and ``v``."""

    k: Tensor
    v: Tensor

    input_gate: Tensor
    """*Shape:* ``([E,]3*I,H)``, as ``forget_gate``."""

    forget_gate: Tensor

    input_bias: Tensor
    """*Shape:* ``([E,]H)``, as ``forget_bias``."""

    forget_bias: Tensor


def project_forward(
    convolved: Tensor, conv_input: Tensor, weights: CellWeights, rows: RaggedRows
) -> tuple[Tensor, Tensor]:
    """Compute q, k and v, and what the gates are before their non-linearity.

    Sums are float32; q, k and v are rounded to the type of ``convolved`` before they
    meet the gates' weights, and all weights are.

    :param convolved: u, contiguous. *Shape:* ``(C,I)``.
    :param conv_input: a, of the same type; its last stride is 1. *Shape:* ``(C,I)``.
    :param weights: The parameters.
    :param rows: Where rows are.

    :returns: q, k and v side by side, ``(C,3*I)``, and the gates i and f, float32,
        ``(C,2*H)``.

    :raises ValueError: The blocks of ``weights.q`` are of a size that is no power of 2,
        or above 64.
    """
    num_rows, width = convolved.shape
    num_heads = weights.input_bias.size(-1)
    sizes = _sizes(convolved, weights)
    qkv = convolved.new_empty(num_rows, 3 * width)
    gates = convolved.new_empty(num_rows, 2 * num_heads, dtype=torch.float32)

    if num_rows > 0:
        num_experts = rows.num_experts
        num_slots = ceil_div(num_rows, sizes["ROWS"]) + num_experts - 1
        cell_inputs_forward_kernel[(num_slots,)](
            *(convolved, conv_input, *weights, rows.begins, qkv, gates),
            *(rows.num_seqs, conv_input.stride(0)),
            NUM_EXPERTS=num_experts,
            **sizes,
        )

    return qkv, gates


def project_backward(
    grad_qkv: Tensor,
    grad_gates: Tensor,
    convolved: Tensor,
    conv_input: Tensor,
    weights: CellWeights,
    rows: RaggedRows,
    sums: PartialSums,
    grad_convolved: Tensor,
    grad_conv_input: Tensor,
    *,
    adds_to_convolved: bool = False,
) -> None:
    """Compute the gradients of :func:`project_forward`.

    :param grad_qkv: Its last stride is 1. *Shape:* ``(C,3*I)``.
    :param grad_gates: Contiguous and float32. *Shape:* ``(C,2*H)``.
    :param convolved: As there, as what follows.
    :param conv_input: As there.
    :param weights: As there.
    :param rows: As there.
    :param sums: Gets the gradients of the parameters, in their order.
    :param grad_convolved: Gets the gradient; its last stride is 1. *Shape:* ``(C,I)``.
    :param grad_conv_input: As ``grad_convolved``.
    :param adds_to_convolved: Whether ``grad_convolved`` is added to.
    """
    num_rows, width = convolved.shape
    sizes = _sizes(grad_qkv, weights)

    partials = sums.new_slots(_RUN, weights)

    if num_rows == 0:
        return

    grid = (ceil_div(width, sizes["SPAN"]), partials.size(0))
    cell_inputs_backward_kernel[grid](
        *(grad_qkv, grad_gates, convolved, conv_input, *weights[:5], rows.begins),
        *(grad_convolved, grad_conv_input, partials, rows.num_seqs),
        *(grad_qkv.stride(0), conv_input.stride(0)),
        *(grad_convolved.stride(0), grad_conv_input.stride(0), partials.size(1)),
        NUM_EXPERTS=rows.num_experts,
        RUN=_RUN,
        ADDS_CONVOLVED=adds_to_convolved,
        **(sizes | {"ROWS": _ROWS // 2}),
    )


def _sizes(seqs: Tensor, weights: CellWeights) -> dict[str, Any]:
    num_groups, block = weights.q.shape[-3:-1]
    num_heads = weights.input_bias.size(-1)

    if block & (block - 1) or block > _MAX_BLOCK:
        raise ValueError(
            f"`weights.q` must have blocks of a power of 2, at most {_MAX_BLOCK}, but "
            f"has blocks of {block} instead."
        )

    is_wide = seqs.dtype == torch.float32

    return {
        "WIDTH": num_groups * block,
        "BLOCK": block,
        "NUM_HEADS": num_heads,
        # Tiles of float32 need as many registers as there are.
        "ROWS": _ROWS // 2 if is_wide else _ROWS,
        "SPAN": max(block, 32 if is_wide else 64),
        "GATES": max(power_of_two(2 * num_heads), 16),
        "INTERPRETED": is_interpreted(),
        "PRECISION": find_precision(seqs.dtype),
        # Of 8 warps two groups would split columns of 16-bit products, and exchange
        # them by shared memory.
        "num_warps": 8 if is_wide else 4,
        "num_stages": 2,
    }
