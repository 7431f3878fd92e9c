"""A whole sLSTM block on ragged rows, for training on a GPU: few launches, few passes.

The block of :mod:`moxe_plugin.nn.slstm` as one autograd function, as
:mod:`.mlstm_block` is that of the mLSTM.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moxe_plugin.nn.block_weights import SLSTMWeights
from moxe_plugin.nn.expert_products import (
    add_expert_products,
    expert_outer_products,
    expert_products,
)
from moxe_plugin.nn.ragged import RaggedRows, ends_of_experts
from moxe_plugin.nn.triton.block_params import stack_params, unstack_grads
from moxe_plugin.nn.triton.head_products import (
    gate_products,
    gate_products_backward,
    gate_weight_grads,
)
from moxe_plugin.nn.triton.partials import PartialSums
from moxe_plugin.nn.triton.row_conv import (
    KERNEL_SIZE,
    causal_conv_silu_backward,
    causal_conv_silu_forward,
)
from moxe_plugin.nn.triton.row_norm import norm_backward, norm_forward
from moxe_plugin.nn.triton.row_norm_pair import norm_pair_backward, norm_pair_forward
from moxe_plugin.nn.triton.row_products import (
    silu_product_backward,
    silu_product_forward,
)
from moxe_plugin.nn.triton.slstm_rows import supports as scan_supports
from moxe_plugin.nn.triton.slstm_rows_launch import (
    scan_backward,
    scan_forward,
    segments_of,
)


def supports(head_dim: int, dtype: torch.dtype, kernel_size: int) -> bool:
    """Tell whether the kernels have these sizes.

    :param head_dim: The width D of a head.
    :param dtype: What is computed in.
    :param kernel_size: The number of taps of the convolution.

    :returns: Whether they do.
    """
    return scan_supports(head_dim, dtype) and kernel_size == KERNEL_SIZE


def slstm_block_rows(
    flat: Tensor,
    weights: SLSTMWeights,
    rows: RaggedRows,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Apply the block to all segments, each from an empty memory.

    :param flat: Of ``dtype`` or wider. *Shape:* ``(C,M)``.
    :param weights: The parameters; those of a bank have E first.
    :param rows: Where rows stand.
    :param eps: What norms add to the variance.
    :param dtype: What is computed in between, see
        :func:`~moxe_plugin.nn.triton.slstm_rows.supports`; the parameters are converted
        to it.

    :returns: Of the type of ``flat``. *Shape:* ``(C,M)``.
    """
    with torch.autocast(flat.device.type, enabled=False):
        return _SLSTMBlockRows.apply(rows, eps, dtype, flat, *weights)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped


_STACKED: Final = [
    SLSTMWeights._fields.index(x)
    for x in ("gate_proj", "recurrent_weight", "ffn_up_proj", "ffn_down_proj")
]


class _SLSTMBlockRows(Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: RaggedRows,
        eps: float,
        dtype: torch.dtype,
        flat: Tensor,
        *params: Tensor,
    ) -> Tensor:
        w = SLSTMWeights(*stack_params(params, dtype, _STACKED))
        flat = flat.contiguous()
        ends = ends_of_experts(rows)
        num_heads = w.gate_proj.size(1)

        normed, stats = norm_forward(flat, w.norm, rows, 1, eps)
        convolved = causal_conv_silu_forward(normed, w.conv_weight, w.conv_bias, rows)
        # i and f see the convolution, z and o do not.
        gate_inputs = gate_products(convolved, normed, w.gate_proj, rows)

        outputs, saved, _ = scan_forward(
            *(gate_inputs.unbind(), w.gate_bias, w.recurrent_weight),
            segments_of(rows),
            saves=True,
        )

        mixed, ffn_normed, mixed_stats = norm_pair_forward(
            *(outputs, w.out_norm, flat, w.ffn_norm, rows, num_heads, eps)
        )
        projected = expert_products(ffn_normed, w.ffn_up_proj, rows.counts, ends)
        gated = silu_product_forward(projected)
        out = add_expert_products(mixed, gated, w.ffn_down_proj, rows.counts, ends)

        ctx.save_for_backward(
            *(flat, stats, normed, convolved, outputs, *saved),
            *(mixed, mixed_stats, ffn_normed, projected, gated, *w),
        )
        ctx.rows, ctx.ends = rows, ends
        ctx.params = [(x.dtype, x.shape) for x in params]

        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        flat, stats, normed, convolved, outputs, before, *others = ctx.saved_tensors
        gates, cs, mixed, mixed_stats, ffn_normed, *others = others
        projected, gated, *params = others
        rows: RaggedRows = ctx.rows
        ends: Tensor | None = ctx.ends
        w = SLSTMWeights(*params)
        num_heads = w.gate_proj.size(1)
        grad_out = grad_out.contiguous()
        # Of the residual stream; the block's own part is of its products' type.
        grad = grad_out.to(gated.dtype)

        grad_ffn_down = expert_outer_products(gated, grad, rows.counts, ends)
        grad_gated = expert_products(grad, w.ffn_down_proj.mT, rows.counts, ends)
        grad_projected = silu_product_backward(grad_gated, projected)
        grad_ffn_up = expert_outer_products(
            ffn_normed, grad_projected, rows.counts, ends
        )
        grad_ffn_normed = expert_products(
            grad_projected, w.ffn_up_proj.mT, rows.counts, ends
        )
        # Not rounded where the first parameter, and so all, are float32: under autocast
        sums = PartialSums(rows, ctx.params[0][0])
        grads = norm_pair_backward(
            *(grad_out, grad_ffn_normed, outputs, w.out_norm, mixed, w.ffn_norm),
            *(mixed_stats, rows, num_heads, sums),
        )

        grad_inputs, grad_bias, _ = scan_backward(
            w.recurrent_weight, segments_of(rows), gates, cs, grads.flat
        )
        gate_weight_grads(
            before, convolved, normed, grad_inputs, w.gate_proj, rows, sums
        )
        grad_convolved, grad_normed = gate_products_backward(
            grad_inputs, w.gate_proj, rows
        )
        causal_conv_silu_backward(
            *(grad_convolved, normed, w.conv_weight, w.conv_bias, rows, sums),
            out=grad_normed,
            add=grad_normed,
        )
        grad_flat = norm_backward(
            *(grad_normed, flat, w.norm, stats, rows, 1, sums, grads.residual)
        )

        grad_out_norm, grad_ffn_norm, grad_recurrent, *others = sums.add_up()
        grad_gate_proj, grad_conv_weight, grad_conv_bias, grad_norm = others
        grad_params = (
            *(grad_norm, grad_conv_weight, grad_conv_bias, grad_gate_proj),
            *(grad_recurrent, grad_bias, grad_out_norm, grad_ffn_norm),
            *(grad_ffn_up, grad_ffn_down),
        )

        return (
            *(None, None, None, grad_flat),
            *unstack_grads(grad_params, ctx.params),
        )
