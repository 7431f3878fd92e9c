"""What an mLSTM block does between its convolution and its gate, as one function.

On a CPU in float32, where products are C++. Queries, keys and values are read by the
cell and by its gates: the gradients of both add up where they are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override

from moxe_plugin.nn.grouped import spread
from moxe_plugin.nn.native.mlstm_forms import MLSTMForm
from moxe_plugin.nn.native.products import multiply_columns, multiply_rows


class MLSTMProjections(NamedTuple):
    """What the cell's inputs are made with, see the mLSTM block.

    I is the width, H the number of heads, and channels are projected in G groups.
    """

    q: Tensor
    """Of the queries. *Shape:* ``(E,G,I/G,I/G)``."""

    k: Tensor
    """Of the keys. *Shape:* ``(E,G,I/G,I/G)``."""

    v: Tensor
    """Of the values. *Shape:* ``(E,G,I/G,I/G)``."""

    gates: Tensor
    """Of queries, keys and values side by side, to input gates, then forget gates.
    *Shape:* ``(E,3*I,2*H)``."""

    gate_bias: Tensor
    """*Shape:* ``(E,2*H)``."""


def mlstm_hidden_rows(
    conv_input: Tensor,
    convolved: Tensor,
    projections: MLSTMProjections,
    counts: Sequence[int],
    form: MLSTMForm,
) -> Tensor:
    """Project rows to what the cell reads, and run it.

    All are float32 and on the CPU, where products are C++.

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
        num_heads = weights.gate_bias.size(1) // 2

        inputs = convolved, convolved, conv_input
        projected = [convolved.new_empty(convolved.shape) for _ in inputs]
        for x, weight, out in zip(inputs, weights[:3], projected, strict=True):
            multiply_rows(x, weight, out, counts)

        gates = spread(weights.gate_bias, counts)
        for x, weight in zip(projected, _split(weights.gates), strict=True):
            multiply_rows(x, weight, gates, counts, adds=True)

        # (C,I) -> (C,H,D)
        q, k, v = (x.unflatten(1, (num_heads, -1)) for x in projected)
        hidden, saved = form.forward(q, k, v, gates)

        ctx.save_for_backward(conv_input, convolved, *weights[:-1], *projected, *saved)
        ctx.form, ctx.counts = form, counts

        return hidden.flatten(1)

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor) -> tuple[Tensor | None, ...]:
        conv_input, convolved, *tensors = ctx.saved_tensors
        weights, gate_weight = tensors[:3], tensors[3]
        projected, saved = tensors[4:7], tensors[7:]
        counts: list[int] = ctx.counts
        form: MLSTMForm = ctx.form

        num_heads = gate_weight.size(2) // 2
        heads = grad_hidden.contiguous().unflatten(1, (num_heads, -1))
        *grads, grad_gates = form.backward(saved, heads)
        grads = [x.flatten(1) for x in grads]

        grad_gate_weight = _contiguous_like(gate_weight)
        for x, grad, weight, grad_weight in zip(
            *(projected, grads, _split(gate_weight), _split(grad_gate_weight)),
            strict=True,
        ):
            multiply_columns(x, grad_gates, grad_weight, counts)
            multiply_rows(grad_gates, weight.mT, grad, counts, adds=True)

        # Those of q, k and v; a frozen block spares their products.
        grad_weights = [
            _contiguous_like(weight) if needs_grad else None
            for weight, needs_grad in zip(
                weights, ctx.needs_input_grad[4:7], strict=True
            )
        ]
        inputs = convolved, convolved, conv_input
        for x, grad, of_weight in zip(inputs, grads, grad_weights, strict=True):
            if of_weight is not None:
                multiply_columns(x, grad, of_weight, counts)

        grad_convolved, grad_conv_input = (
            convolved.new_empty(convolved.shape) for _ in range(2)
        )
        of_q, of_k, of_v = (x.mT for x in weights)
        multiply_rows(grads[0], of_q, grad_convolved, counts)
        multiply_rows(grads[1], of_k, grad_convolved, counts, adds=True)
        multiply_rows(grads[2], of_v, grad_conv_input, counts)

        grad_bias = torch.stack([x.sum(dim=0) for x in grad_gates.split(counts)])

        return (
            *(None, None, grad_conv_input, grad_convolved),
            *(*grad_weights, grad_gate_weight, grad_bias),
        )


def _contiguous_like(x: Tensor) -> Tensor:
    # Whatever the strides of a parameter are
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _split(gate_weight: Tensor) -> list[Tensor]:
    # (E,3*I,2*H) -> three of (E,1,I,2*H)
    return list(gate_weight.unsqueeze(1).chunk(3, dim=2))
