"""The ends of the blocks' branches, where a gate meets what it lets through, in C++.

Each is one pass over memory, computed in float32 where that keeps bfloat16. The sums of
gradients are added in an order that does not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override

from moxe_plugin.nn.native.library import SUFFIXES, find_function, pointers_to


class MLSTMOutput(NamedTuple):
    """What meets at the end of the mLSTM's branch.

    All are of one dtype of :data:`~moxe_plugin.nn.native.library.SUFFIXES`, and on the
    CPU. Rows are sorted by expert.
    """

    hidden: Tensor
    """The cell's outputs h. *Shape:* ``(C,I)``."""

    weight: Tensor
    """The scale w of their norm. *Shape:* ``(E,I)``."""

    convolved: Tensor
    """What the queries were made of, u. *Shape:* ``(C,I)``."""

    skip: Tensor
    """Its factor. *Shape:* ``(E,I)``."""

    gate: Tensor
    """The gate's pre-activations z; rows may lie apart. *Shape:* ``(C,I)``."""


def gate_mlstm_output(
    inputs: MLSTMOutput, counts: Sequence[int], num_heads: int, eps: float
) -> Tensor:
    """Compute ``(norm_per_head(h) * w + skip * u) * silu(z)``.

    :param inputs: What meets.
    :param counts: The number of rows of each expert, C in all.
    :param num_heads: The number of heads, which divides I.
    :param eps: Is added to the variance of a head.

    :returns: *Shape:* ``(C,I)``.

    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    return _GateMLSTMOutput.apply(array("q", counts), num_heads, eps, *inputs)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped


def silu_product(joint: Tensor) -> Tensor:
    """Compute ``silu(a) * b`` of ``joint = [a, b]``.

    :param joint: Of a dtype of :data:`~moxe_plugin.nn.native.library.SUFFIXES`, on the
        CPU. *Shape:* ``(…,2I)``.

    :returns: *Shape:* ``(…,I)``.

    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    return _SiluProduct.apply(joint)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped


def gate_rows(
    inputs: MLSTMOutput, counts: array[int], num_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute :func:`gate_mlstm_output` without a gradient.

    :param inputs: As there, contiguous but for the gate, whose last stride is 1.
    :param counts: As there.
    :param num_heads: As there.
    :param eps: As there.

    :returns: The rows ``(C,I)``, and the mean and one over the deviation of each head,
        ``(C,H,2)``, which :func:`gate_rows_backward` wants.
    """
    hidden = inputs.hidden
    out = torch.empty_like(hidden)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    stats = hidden.new_empty(hidden.size(0), num_heads, 2, dtype=wide)

    _call_output("forward", counts, num_heads, eps, *inputs, out, stats)

    return out, stats


def gate_rows_backward(
    grad: Tensor, inputs: MLSTMOutput, stats: Tensor, counts: array[int], eps: float
) -> MLSTMOutput:
    """Compute the gradients of :func:`gate_rows`.

    :param grad: That of the rows; contiguous. *Shape:* ``(C,I)``.
    :param inputs: As there.
    :param stats: What it has returned.
    :param counts: As there.
    :param eps: As there.

    :returns: Those of the inputs.
    """
    *others, gate = inputs
    grads = MLSTMOutput._make(
        [*(torch.empty_like(x) for x in others), gate.new_empty(gate.shape)]
    )

    _call_output(
        *("backward", counts, stats.size(1), eps), *(*inputs, stats, grad, *grads)
    )

    return grads


def silu_rows(joint: Tensor) -> Tensor:
    """Compute :func:`silu_product` without a gradient.

    :param joint: As there, contiguous. *Shape:* ``(…,2I)``.

    :returns: *Shape:* ``(…,I)``.
    """
    out = joint.new_empty(*joint.shape[:-1], joint.size(-1) // 2)

    _call_silu("forward", joint, out)

    return out


def silu_rows_backward(grad: Tensor, joint: Tensor) -> Tensor:
    """Compute the gradient of :func:`silu_rows`.

    :param grad: That of the result; contiguous. *Shape:* ``(…,I)``.
    :param joint: As there.

    :returns: *Shape:* ``(…,2I)``.
    """
    grad_joint = torch.empty_like(joint)

    _call_silu("backward", joint, grad, grad_joint)

    return grad_joint


class _GateMLSTMOutput(Function):
    @staticmethod
    @override
    def forward(
        ctx: Any, counts: array[int], num_heads: int, eps: float, *inputs: Tensor
    ) -> Tensor:
        *others, gate = inputs
        gate = gate if gate.stride(1) == 1 else gate.contiguous()
        dense = MLSTMOutput._make([*(x.contiguous() for x in others), gate])

        out, stats = gate_rows(dense, counts, num_heads, eps)

        ctx.save_for_backward(*dense, stats)
        ctx.counts, ctx.eps = counts, eps

        return out

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, stats = ctx.saved_tensors

        grads = gate_rows_backward(
            grad.contiguous(), MLSTMOutput(*inputs), stats, ctx.counts, ctx.eps
        )

        return None, None, None, *grads


class _SiluProduct(Function):
    @staticmethod
    @override
    def forward(ctx: Any, joint: Tensor) -> Tensor:
        joint = joint.contiguous()

        ctx.save_for_backward(joint)

        return silu_rows(joint)

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (joint,) = ctx.saved_tensors

        return silu_rows_backward(grad.contiguous(), joint)


def _call_output(
    direction: str,
    counts: array[int],
    num_heads: int,
    eps: float,
    *tensors: Tensor,
) -> None:
    hidden, gate = tensors[0], tensors[4]
    head_dim = hidden.size(1) // num_heads
    shape = len(counts), num_heads, head_dim, gate.stride(0)

    # Each tensor lives until the call returns: the caller holds them.
    _find_function("output", direction, hidden)(
        (ctypes.c_int64 * len(shape))(*shape),
        ctypes.c_void_p(counts.buffer_info()[0]),
        ctypes.c_double(eps),
        ctypes.c_int(torch.get_num_threads()),
        *pointers_to(*tensors),
    )


def _call_silu(direction: str, joint: Tensor, *tensors: Tensor) -> None:
    dim = joint.size(-1) // 2

    _find_function("silu", direction, joint)(
        ctypes.c_int64(joint.numel() // (2 * dim) if dim > 0 else 0),
        ctypes.c_int64(dim),
        ctypes.c_int(torch.get_num_threads()),
        *pointers_to(joint, *tensors),
    )


def _find_function(name: str, direction: str, x: Tensor) -> Any:
    return find_function("gating", f"moxe_{name}_{direction}_{SUFFIXES[x.dtype]}")
