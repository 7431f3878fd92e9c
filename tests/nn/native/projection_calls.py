"""Calls of `mlstm_projections.cpp` from Python: blocks make them in C++."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moxe_plugin.nn.native.library import (
    find_function,
    int64_array,
    pointers_to,
)
from moxe_plugin.nn.native.mlstm_forms import CellGradients
from moxe_plugin.nn.native.products import find_suffix, rounding_now


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

    input_gate: Tensor
    """Of queries, keys and values side by side. *Shape:* ``(E,3*I,H)``."""

    forget_gate: Tensor
    """Likewise. *Shape:* ``(E,3*I,H)``."""

    input_gate_bias: Tensor
    """*Shape:* ``(E,H)``."""

    forget_gate_bias: Tensor
    """*Shape:* ``(E,H)``."""


class ProjectionInputs(NamedTuple):
    """What is projected: rows of all experts, on the CPU.

    They and the weights are float32, or bfloat16 where products in C++ multiply it.
    """

    conv_input: Tensor
    """What values are made of. *Shape:* ``(C,I)``."""

    convolved: Tensor
    """What queries and keys are made of. *Shape:* ``(C,I)``."""


class ProjectedRows(NamedTuple):
    """What the cell reads. Its gradients are :class:`CellGradients`."""

    q: Tensor
    """*Shape:* ``(C,I)``."""

    k: Tensor
    """*Shape:* ``(C,I)``."""

    v: Tensor
    """*Shape:* ``(C,I)``."""

    gates: Tensor
    """Pre-activations of input gates, then of forget gates; float32. *Shape:*
    ``(C,2*H)``."""


class ProjectionGradients(NamedTuple):
    """The gradients of inputs and projections."""

    conv_input: Tensor
    """*Shape:* ``(C,I)``."""

    convolved: Tensor
    """*Shape:* ``(C,I)``."""

    weights: list[Tensor | None]
    """Of q, k and v; ``None`` where none was wanted. *Shape:* ``(E,G,I/G,I/G)``."""

    of_gates: list[Tensor]
    """Of the weights of input and forget gates, then of their biases. *Shape:*
    ``(E,3*I,H)`` and ``(E,H)``."""


def project_rows(
    inputs: ProjectionInputs, projections: MLSTMProjections, counts: Sequence[int]
) -> ProjectedRows:
    """Project rows to what the cell reads.

    :param inputs: The rows.
    :param projections: The weights.
    :param counts: The number of rows of each expert, C in all.

    :returns: The results.

    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    conv_input, convolved = _densify(inputs)
    weights = [x.contiguous() for x in projections]

    q, k, v = convolved.new_empty(3, *convolved.shape).unbind()
    num_gates = 2 * projections.input_gate.size(-1)
    gates = convolved.new_empty(len(convolved), num_gates, dtype=torch.float32)
    projected = ProjectedRows(q, k, v, gates)

    _call("project", weights, counts, [conv_input, convolved, *weights, *projected])

    return projected


def project_rows_backward(
    inputs: ProjectionInputs,
    projections: MLSTMProjections,
    projected: ProjectedRows,
    grads: CellGradients,
    counts: Sequence[int],
    wants_weights: Sequence[bool],
    onto: Tensor,
) -> ProjectionGradients:
    """Compute the gradients.

    :param inputs: As for :func:`project_rows`.
    :param projections: As there.
    :param projected: What it has returned.
    :param grads: The gradients of that.
    :param counts: As there.
    :param wants_weights: Whether to compute those of the weights of q, k and v.
    :param onto: What is added to the gradient of ``convolved``, which takes its place;
        contiguous. *Shape:* ``(C,I)``.

    :returns: The gradients.
    """
    conv_input, convolved = _densify(inputs)
    weights = [x.contiguous() for x in projections]
    wanted = ProjectionGradients(
        torch.empty_like(convolved),
        onto,
        [
            torch.empty_like(x) if wants else None
            for x, wants in zip(weights[:3], wants_weights, strict=True)
        ],
        [torch.empty_like(x) for x in weights[3:]],
    )

    _call(
        "project_backward",
        weights,
        counts,
        [
            *(conv_input, convolved, *projected[:3], *weights[:5]),
            *(x.contiguous() for x in grads),
            *(wanted.conv_input, wanted.convolved),
            *(*wanted.weights, *wanted.of_gates),
        ],
    )

    return wanted


def _densify(inputs: ProjectionInputs) -> tuple[Tensor, Tensor]:
    conv_input, convolved = inputs

    # Its rows may lie apart, as a half of what is projected does.
    if conv_input.stride(-1) != 1:
        conv_input = conv_input.contiguous()

    return conv_input, convolved.contiguous()


def _call(
    name: str,
    weights: Sequence[Tensor],
    counts: Sequence[int],
    tensors: Sequence[Tensor | None],
) -> None:
    q_weight, _, _, gate_weight, *_ = weights
    conv_input = tensors[0]
    assert conv_input is not None
    shape = *q_weight.shape[:2], 2 * gate_weight.size(-1), conv_input.stride(0)
    suffix = find_suffix(conv_input.dtype, rounding_now())

    # The tensors live until the call returns: the caller holds them.
    find_function("mlstm_projections", f"moxe_mlstm_{name}_{suffix}")(
        int64_array(shape),
        int64_array(counts),
        ctypes.c_int(torch.get_num_threads()),
        *pointers_to(*tensors),
    )
