"""What an mLSTM block does between its convolution and its gate, as one function.

On a CPU in float32 or bfloat16, where products are C++. Queries, keys and values are
read by the cell and by its gates: the gradients of both add up where they are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override

from moxe_plugin.nn.autocast import recalls_autocast, remembers_autocast
from moxe_plugin.nn.native.mlstm_forms import MLSTMForm
from moxe_plugin.nn.native.mlstm_projections import (
    MLSTMProjections,
    ProjectedRows,
    ProjectionInputs,
    project_rows,
    project_rows_backward,
)


def mlstm_hidden_rows(
    conv_input: Tensor,
    convolved: Tensor,
    projections: MLSTMProjections,
    counts: Sequence[int],
    form: MLSTMForm,
) -> Tensor:
    """Project rows to what the cell reads, and run it.

    All are of one type and on the CPU, where products of it are C++, and
    :func:`~moxe_plugin.nn.native.mlstm_projections.fits`.

    :param conv_input: What values are made of; rows may lie apart. *Shape:* ``(C,I)``.
    :param convolved: What queries and keys are made of. *Shape:* ``(C,I)``.
    :param projections: The weights.
    :param counts: The number of rows of each expert, C in all.
    :param form: Runs the cell.

    :returns: The outputs of the cell, 0 at padding. *Shape:* ``(C,I)``.

    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    return _MLSTMHidden.apply(form, list(counts), conv_input, convolved, *projections)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped


class _MLSTMHidden(Function):
    @staticmethod
    @remembers_autocast
    @override
    def forward(
        ctx: Any,
        form: MLSTMForm,
        counts: list[int],
        conv_input: Tensor,
        convolved: Tensor,
        *projections: Tensor,
    ) -> Tensor:
        weights = MLSTMProjections(*projections)
        projected = project_rows(
            ProjectionInputs(conv_input, convolved), weights, counts
        )

        # (C,I) -> (C,H,D)
        num_heads = weights.gate_bias.size(1) // 2
        q, k, v = (x.unflatten(1, (num_heads, -1)) for x in projected[:3])
        hidden, saved = form.forward(q, k, v, projected.gates)

        ctx.save_for_backward(conv_input, convolved, *weights, *projected, *saved)
        ctx.form, ctx.counts = form, counts

        return hidden.flatten(1)

    @staticmethod
    @recalls_autocast
    @override
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weights, projected, saved = _regroup(ctx.saved_tensors)
        form: MLSTMForm = ctx.form

        num_heads = weights.gate_bias.size(1) // 2
        heads = grad_hidden.contiguous().unflatten(1, (num_heads, -1))
        grads = form.backward(saved, heads)

        # A frozen block spares the products of its weights.
        of = project_rows_backward(
            *(inputs, weights, projected, grads, ctx.counts),
            wants_weights=ctx.needs_input_grad[4:7],
        )
        of_bias = torch.stack([x.sum(dim=0) for x in grads.gates.split(ctx.counts)])

        return (
            *(None, None, of.conv_input, of.convolved),
            *(*of.weights, of.gate_weight, of_bias.to(weights.gate_bias.dtype)),
        )


def _regroup(
    tensors: Sequence[Tensor],
) -> tuple[ProjectionInputs, MLSTMProjections, ProjectedRows, Sequence[Tensor]]:
    return (
        ProjectionInputs(*tensors[:2]),
        MLSTMProjections(*tensors[2:7]),
        ProjectedRows(*tensors[7:11]),
        tensors[11:],
    )
