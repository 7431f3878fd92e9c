"""A whole mLSTM block on ragged rows, for training on a GPU: few launches, few passes.

The block of :mod:`moxe_plugin.nn.mlstm` as one autograd function. What two operations
of its backward pass contribute to the same gradient is written side by side, or added,
by the kernels themselves.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moxe_plugin.nn.block_weights import MLSTMWeights
from moxe_plugin.nn.expert_products import (
    add_expert_products,
    expert_outer_products,
    expert_products,
)
from moxe_plugin.nn.ragged import RaggedRows, ends_of_experts
from moxe_plugin.nn.triton.block_params import stack_params, unstack_grads
from moxe_plugin.nn.triton.block_products import (
    CellWeights,
    project_backward,
    project_forward,
)
from moxe_plugin.nn.triton.mlstm_rows import mlstm_rows_backward, mlstm_rows_forward
from moxe_plugin.nn.triton.partials import PartialSums
from moxe_plugin.nn.triton.row_conv import (
    KERNEL_SIZE,
    causal_conv_silu_backward,
    causal_conv_silu_forward,
)
from moxe_plugin.nn.triton.row_gated_norm import (
    GatedNormInputs,
    gated_norm_backward,
    gated_norm_forward,
)
from moxe_plugin.nn.triton.row_norm import norm_backward, norm_forward


def supports(head_dim: int, block_size: int, kernel_size: int) -> bool:
    """Tell whether the kernels have these sizes.

    :param head_dim: The width D of a head.
    :param block_size: How many channels q, k and v mix at a time.
    :param kernel_size: The number of taps of the convolution.

    :returns: Whether they do.
    """
    return (
        head_dim % 16 == 0 and block_size in (16, 32, 64) and kernel_size == KERNEL_SIZE
    )


def mlstm_block_rows(
    flat: Tensor,
    weights: MLSTMWeights,
    rows: RaggedRows,
    num_heads: int,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Apply the block to all segments, each from an empty memory.

    :param flat: Of ``dtype`` or wider. *Shape:* ``(C,M)``.
    :param weights: The parameters; those of a bank have E first.
    :param rows: Where rows stand.
    :param num_heads: The number of heads H.
    :param eps: What norms add to the variance.
    :param dtype: What is computed in between; the parameters are converted to it.

    :returns: Of the type of ``flat``. *Shape:* ``(C,M)``.
    """
    with torch.autocast(flat.device.type, enabled=False):
        return _MLSTMBlockRows.apply(rows, num_heads, eps, dtype, flat, *weights)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped


_STACKED: Final = [MLSTMWeights._fields.index(x) for x in ("up_proj", "down_proj")]


def _cell_weights(weights: MLSTMWeights) -> CellWeights:
    # Those that make the cell's inputs
    return CellWeights(*weights[4:11])


class _MLSTMBlockRows(Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: RaggedRows,
        num_heads: int,
        eps: float,
        dtype: torch.dtype,
        flat: Tensor,
        *params: Tensor,
    ) -> Tensor:
        w = MLSTMWeights(*stack_params(params, dtype, _STACKED))
        flat = flat.contiguous()
        ends = ends_of_experts(rows)

        normed, stats = norm_forward(flat, w.norm, rows, 1, eps)
        # What is convolved, and the output's gate
        projected = expert_products(normed, w.up_proj, rows.counts, ends)
        conv_input, gate = projected.chunk(2, dim=1)
        convolved = causal_conv_silu_forward(
            conv_input, w.conv_weight, w.conv_bias, rows
        )
        qkv, gates = project_forward(convolved, conv_input, _cell_weights(w), rows)
        q, k, v = qkv.chunk(3, dim=1)
        hidden, small = mlstm_rows_forward(q, k, v, gates, rows, num_heads)
        gated, out_stats = gated_norm_forward(
            GatedNormInputs(hidden, convolved, gate, w.out_norm, w.skip),
            *(rows, num_heads, eps),
        )
        out = add_expert_products(flat, gated, w.down_proj, rows.counts, ends)

        ctx.save_for_backward(
            *(flat, stats, normed, projected, convolved, qkv, gates, hidden, small),
            *(gated, out_stats, *w),
        )
        ctx.rows, ctx.ends = rows, ends
        ctx.num_heads = num_heads
        ctx.params = [(x.dtype, x.shape) for x in params]

        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        flat, stats, normed, projected, convolved, *others = ctx.saved_tensors
        qkv, gates, hidden, small, gated, out_stats, *params = others
        rows: RaggedRows = ctx.rows
        ends: Tensor | None = ctx.ends
        w = MLSTMWeights(*params)
        grad_out = grad_out.contiguous()
        # Of the residual stream; the block's own part is of its products' type.
        grad = grad_out.to(gated.dtype)
        conv_input, gate = projected.chunk(2, dim=1)

        grad_projected = torch.empty_like(projected)
        grad_conv_input, grad_gate = grad_projected.chunk(2, dim=1)

        grad_down = expert_outer_products(gated, grad, rows.counts, ends)
        grad_gated = expert_products(grad, w.down_proj.mT, rows.counts, ends)
        # Not rounded where the first parameter, and so all, are float32: under autocast
        sums = PartialSums(rows, ctx.params[0][0])
        grads = gated_norm_backward(
            grad_gated,
            GatedNormInputs(hidden, convolved, gate, w.out_norm, w.skip),
            *(out_stats, rows, ctx.num_heads, sums, grad_gate),
        )

        grad_qkv = torch.empty_like(qkv)
        grad_gates = mlstm_rows_backward(
            *(*qkv.chunk(3, dim=1), gates, hidden, small, grads.hidden),
            *(*grad_qkv.chunk(3, dim=1), rows),
        )
        grad_convolved = grads.convolved
        project_backward(
            *(
                grad_qkv,
                grad_gates,
                convolved,
                conv_input,
                _cell_weights(w),
                rows,
                sums,
            ),
            *(grad_convolved, grad_conv_input),
            adds_to_convolved=True,
        )
        causal_conv_silu_backward(
            *(grad_convolved, conv_input, w.conv_weight, w.conv_bias, rows, sums),
            out=grad_conv_input,
            add=grad_conv_input,
        )

        grad_up = expert_outer_products(normed, grad_projected, rows.counts, ends)
        grad_normed = expert_products(grad_projected, w.up_proj.mT, rows.counts, ends)
        grad_flat = norm_backward(
            *(grad_normed, flat, w.norm, stats, rows, 1, sums, grad_out)
        )

        grad_out_norm, grad_skip, *small = sums.add_up()
        *grad_cell, grad_conv_weight, grad_conv_bias, grad_norm = small
        grad_params = (
            *(grad_norm, grad_up, grad_conv_weight, grad_conv_bias, *grad_cell),
            *(grad_out_norm, grad_skip, grad_down),
        )

        return (
            *(None, None, None, None, grad_flat),
            *unstack_grads(grad_params, ctx.params),
        )
