"""A whole sLSTM block on rows as one function, in C++.

As :mod:`moxe_plugin.nn.native.mlstm_block` of the block of
:mod:`moxe_plugin.nn.slstm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override

from moxe_plugin.nn.autocast import recalls_autocast, remembers_autocast
from moxe_plugin.nn.block_weights import SLSTMWeights
from moxe_plugin.nn.native.block_params import (
    BlockRows,
    project,
    project_onto,
    stack_params,
    unstack_grads,
    weight_gradient,
)
from moxe_plugin.nn.native.causal_conv import (
    ConvInputs,
    convolve_rows,
    convolve_rows_backward,
)
from moxe_plugin.nn.native.gating import silu_rows, silu_rows_backward
from moxe_plugin.nn.native.row_products import ColumnProduct, multiply_columns
from moxe_plugin.nn.native.scale_norm import norm_rows, norm_rows_backward
from moxe_plugin.nn.native.slstm_scan import (
    RowBounds,
    RowScanInputs,
    scan_rows,
    scan_rows_backward,
)
from moxe_plugin.nn.padding import EMPTY, widen


def slstm_block_rows(
    flat: Tensor, weights: SLSTMWeights, rows: BlockRows, bounds: RowBounds, eps: float
) -> Tensor:
    """Apply the block to sequences, each from an empty memory.

    All tensors are of one type, on the CPU, where products of it are C++.

    :param flat: *Shape:* ``(C,M)``.
    :param weights: The parameters; those of a bank have E first.
    :param rows: Whose rows they are.
    :param bounds: Where sequences stand.
    :param eps: What norms add to the variance.

    :returns: *Shape:* ``(C,M)``.

    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    return _SLSTMBlockRows.apply(rows, bounds, eps, flat, *weights)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped


class _SLSTMBlockRows(Function):
    @staticmethod
    @remembers_autocast
    @override
    def forward(
        ctx: Any,
        rows: BlockRows,
        bounds: RowBounds,
        eps: float,
        flat: Tensor,
        *params: Tensor,
    ) -> Tensor:
        w = SLSTMWeights(*stack_params(params))
        flat, counts = flat.contiguous(), rows.counts
        num_heads = w.gate_bias.size(1)

        normed, stats = norm_rows(flat, w.norm, counts, 1, eps)
        convolved = convolve_rows(
            ConvInputs(normed, None, w.conv_weight, w.conv_bias),
            rows.run_lens,
            activates=True,
        )
        # i and f see the convolution, z and o do not.
        gates = project([convolved, normed], _halve(w.gate_proj), counts)
        memory = _empty_memory(w.gate_bias, bounds)
        scanned = scan_rows(
            RowScanInputs._make(
                [*gates, widen(w.gate_bias), w.recurrent_weight, *memory]
            ),
            bounds,
            wants_grad=any(ctx.needs_input_grad),
        )

        hidden, out_stats = norm_rows(
            scanned.outputs, w.out_norm, counts, num_heads, eps, residual=flat
        )
        ffn_normed, ffn_stats = norm_rows(hidden, w.ffn_norm, counts, 1, eps)
        (joint,) = project([ffn_normed], [w.ffn_up_proj.unsqueeze(1)], counts)
        gated = silu_rows(joint)
        out = project_onto(hidden, gated, w.ffn_down_proj.unsqueeze(1), counts)

        ctx.save_for_backward(
            *(flat, stats, normed, convolved, scanned.outputs, scanned.activations),
            *(
                out_stats,
                hidden,
                ffn_stats,
                ffn_normed,
                joint,
                gated,
                memory[-1],
                *params,
            ),
        )
        ctx.rows, ctx.bounds, ctx.eps = rows, bounds, eps

        return out

    @staticmethod
    @recalls_autocast
    @override
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        flat, stats, normed, convolved, outputs, activations, *others = (
            ctx.saved_tensors
        )
        out_stats, hidden, ffn_stats, ffn_normed, joint, gated, zeros, *params = others
        rows: BlockRows = ctx.rows
        bounds: RowBounds = ctx.bounds
        eps: float = ctx.eps

        w, counts = SLSTMWeights(*stack_params(params)), rows.counts
        # A frozen block spares the larger products of its weights.
        needs_flat, *needs_params = ctx.needs_input_grad[3:]
        needs = dict(zip(SLSTMWeights._fields, needs_params, strict=True))
        grad_out = grad_out.contiguous()

        down, up = (x.unsqueeze(1) for x in (w.ffn_down_proj, w.ffn_up_proj))
        grad_down = (
            weight_gradient(gated, grad_out, down, counts)
            if needs["ffn_down_proj"]
            else None
        )
        (grad_gated,) = project([grad_out], [down.mT], counts)
        grad_joint = silu_rows_backward(grad_gated, joint)
        grad_up = (
            weight_gradient(ffn_normed, grad_joint, up, counts)
            if needs["ffn_up_proj"]
            else None
        )
        (grad_ffn_normed,) = project([grad_joint], [up.mT], counts)
        grad_hidden, grad_ffn_norm = norm_rows_backward(
            grad_ffn_normed,
            *(hidden, w.ffn_norm, ffn_stats, counts, eps),
            residual=grad_out,
        )

        grad_outputs, grad_out_norm = norm_rows_backward(
            grad_hidden, outputs, w.out_norm, out_stats, counts, eps
        )
        # What comes after the last step gets no gradient.
        of_scan = scan_rows_backward(
            *(grad_outputs, [zeros] * 3),
            *(w.recurrent_weight, zeros, outputs, activations),
            bounds=bounds,
        )

        grad_gates = of_scan.gates_if, of_scan.gates_zo
        grad_gate_proj = None
        if needs["gate_proj"]:
            grad_gate_proj = torch.empty_like(w.gate_proj)
            multiply_columns(
                [
                    ColumnProduct(*product)
                    for product in zip(
                        *((convolved, normed), grad_gates, _halve(grad_gate_proj)),
                        strict=True,
                    )
                ],
                counts,
            )

        grad_convolved, grad_normed = project(
            grad_gates, [half.mT for half in _halve(w.gate_proj)], counts
        )
        of_conv = convolve_rows_backward(
            grad_convolved,
            ConvInputs(normed, None, w.conv_weight, w.conv_bias),
            rows.run_lens,
            activates=True,
            onto=grad_normed,
        )
        grad_flat, grad_norm = norm_rows_backward(
            grad_normed, flat, w.norm, stats, counts, eps, residual=grad_hidden
        )

        of_params = SLSTMWeights._make(
            [
                *(grad_norm, of_conv.weight, of_conv.bias, grad_gate_proj),
                *(of_scan.recurrent_weight, of_scan.bias),
                *(grad_out_norm, grad_ffn_norm, grad_up, grad_down),
            ]
        )

        return (
            *(None, None, None),
            grad_flat if needs_flat else None,
            *unstack_grads(of_params, params),
        )


def _halve(weight: Tensor) -> list[Tensor]:
    # (E,H,D,4,D) -> (E,H,D,2*D) of i and f, and of z and o
    return [half.flatten(3) for half in weight.chunk(2, dim=3)]


def _empty_memory(bias: Tensor, bounds: RowBounds) -> list[Tensor]:
    # c, log(n) and y: (E,N,H,D)
    num_experts, num_heads, _, head_dim = bias.shape
    zeros = torch.zeros(
        (num_experts, bounds.begins.size(1), num_heads, head_dim),
        dtype=widen(bias[:0]).dtype,
    )

    return [zeros, torch.full_like(zeros, EMPTY), zeros]
