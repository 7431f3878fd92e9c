"""A whole mLSTM block on rows as one function, in C++.

The block of :mod:`moxe_plugin.nn.mlstm`, in float32 or bfloat16 where products are C++.
Between the many short calls of a block autograd would take longer than some of them,
and where two of them contribute to one gradient, it would pass over memory once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override

from moxe_plugin.nn.autocast import recalls_autocast, remembers_autocast
from moxe_plugin.nn.block_weights import MLSTMWeights
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
from moxe_plugin.nn.native.gating import MLSTMOutput, gate_rows, gate_rows_backward
from moxe_plugin.nn.native.mlstm_forms import MLSTMForm
from moxe_plugin.nn.native.mlstm_projections import (
    MLSTMProjections,
    ProjectedRows,
    ProjectionInputs,
    project_rows,
    project_rows_backward,
)
from moxe_plugin.nn.native.row_products import (
    ColumnProduct,
    RowProduct,
    multiply_columns,
    multiply_rows,
)
from moxe_plugin.nn.native.scale_norm import norm_rows, norm_rows_backward


def mlstm_block_rows(
    flat: Tensor,
    weights: MLSTMWeights,
    rows: BlockRows,
    form: MLSTMForm,
    num_heads: int,
    eps: float,
) -> Tensor:
    """Apply the block to sequences, each from an empty memory.

    All tensors are of one type, on the CPU, where products of it are C++, and
    :func:`~moxe_plugin.nn.native.mlstm_projections.fits`.

    :param flat: *Shape:* ``(C,M)``.
    :param weights: The parameters; those of a bank have E first.
    :param rows: Whose rows they are.
    :param form: Runs the cell.
    :param num_heads: The number of heads H.
    :param eps: What norms add to the variance.

    :returns: *Shape:* ``(C,M)``.

    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    return _MLSTMBlockRows.apply(rows, form, num_heads, eps, flat, *weights)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped


class _MLSTMBlockRows(Function):
    @staticmethod
    @remembers_autocast
    @override
    def forward(
        ctx: Any,
        rows: BlockRows,
        form: MLSTMForm,
        num_heads: int,
        eps: float,
        flat: Tensor,
        *params: Tensor,
    ) -> Tensor:
        w = MLSTMWeights(*stack_params(params))
        flat, counts = flat.contiguous(), rows.counts

        normed, stats = norm_rows(flat, w.norm, counts, 1, eps)
        conv_input, gate = project([normed] * 2, _halve(w.up_proj), counts)
        convolved = convolve_rows(
            ConvInputs(conv_input, None, w.conv_weight, w.conv_bias),
            rows.run_lens,
            activates=True,
        )

        projected = project_rows(
            ProjectionInputs(conv_input, convolved), _find_projections(w), counts
        )
        # (C,I) -> (C,H,D)
        q, k, v = (x.unflatten(1, (num_heads, -1)) for x in projected[:3])
        heads, saved = form.forward(q, k, v, projected.gates)
        hidden = heads.flatten(1)

        gated, out_stats = gate_rows(
            MLSTMOutput(hidden, w.out_norm, convolved, w.skip, gate),
            *(counts, num_heads, eps),
        )
        out = project_onto(flat, gated, w.down_proj.unsqueeze(1), counts)

        ctx.save_for_backward(
            *(flat, stats, normed, conv_input, gate, convolved, hidden),
            *(gated, out_stats, *projected, *params, *saved),
        )
        ctx.rows, ctx.form, ctx.num_heads, ctx.eps = rows, form, num_heads, eps

        return out

    @staticmethod
    @recalls_autocast
    @override
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        flat, stats, normed, conv_input, gate, convolved, *others = ctx.saved_tensors
        hidden, gated, out_stats, *others = others
        projected, params = ProjectedRows(*others[:4]), MLSTMWeights(*others[4:18])
        saved = others[18:]
        rows: BlockRows = ctx.rows
        form: MLSTMForm = ctx.form
        eps: float = ctx.eps

        w, counts = MLSTMWeights(*stack_params(params)), rows.counts
        # A frozen block spares the larger products of its weights.
        needs_flat, *needs_params = ctx.needs_input_grad[4:]
        needs = dict(zip(MLSTMWeights._fields, needs_params, strict=True))
        grad_out = grad_out.contiguous()

        down = w.down_proj.unsqueeze(1)
        grad_down = (
            weight_gradient(gated, grad_out, down, counts)
            if needs["down_proj"]
            else None
        )
        (grad_gated,) = project([grad_out], [down.mT], counts)
        of_output = gate_rows_backward(
            grad_gated,
            MLSTMOutput(hidden, w.out_norm, convolved, w.skip, gate),
            *(out_stats, counts, eps),
        )

        grads = form.backward(saved, of_output.hidden.unflatten(1, (ctx.num_heads, -1)))
        of_cell = project_rows_backward(
            ProjectionInputs(conv_input, convolved),
            _find_projections(w),
            *(projected, grads, counts),
            wants_weights=[needs[x] for x in ("q_proj", "k_proj", "v_proj")],
            onto=of_output.convolved,
        )
        of_conv = convolve_rows_backward(
            of_cell.convolved,
            ConvInputs(conv_input, None, w.conv_weight, w.conv_bias),
            rows.run_lens,
            activates=True,
            onto=of_cell.conv_input,
        )

        halves = (of_cell.conv_input, of_output.gate)
        grad_up = None
        if needs["up_proj"]:
            grad_up = torch.empty_like(w.up_proj)
            multiply_columns(
                [
                    ColumnProduct(normed, grad, half)
                    for grad, half in zip(halves, _halve(grad_up), strict=True)
                ],
                counts,
            )

        grad_normed = torch.empty_like(normed)
        for i, half in enumerate(_halve(w.up_proj)):
            product = RowProduct(halves[i], half.mT, grad_normed)
            multiply_rows([product], counts, adds=i > 0)
        grad_flat, grad_norm = norm_rows_backward(
            grad_normed, flat, w.norm, stats, counts, eps, residual=grad_out
        )

        of_params = MLSTMWeights._make(
            [
                *(grad_norm, grad_up, of_conv.weight, of_conv.bias, *of_cell.weights),
                *of_cell.of_gates,
                *(of_output.weight, of_output.skip, grad_down),
            ]
        )

        return (
            *(None, None, None, None),
            grad_flat if needs_flat else None,
            *unstack_grads(of_params, params),
        )


def _halve(weight: Tensor) -> list[Tensor]:
    # (E,M,2*I) -> (E,1,M,I), of what is convolved and of the gate
    return [half.unsqueeze(1) for half in weight.chunk(2, dim=2)]


def _find_projections(w: MLSTMWeights) -> MLSTMProjections:
    return MLSTMProjections(
        *(w.q_proj, w.k_proj, w.v_proj, w.input_gate_weight, w.forget_gate_weight),
        *(w.input_gate_bias, w.forget_gate_bias),
    )
