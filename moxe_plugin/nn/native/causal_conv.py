"""The depthwise causal convolution over time, in C++.

The same function as that of :class:`~moxe_plugin.nn.layers.CausalConv`, which has the
equation. The sums of its gradients are added in an order that depends neither on the
order of execution nor on the number of threads.
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


def causal_conv(
    flat: Tensor,
    window: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    seq_lens: Sequence[int],
    *,
    activates: bool,
) -> Tensor:
    """Convolve sequences that follow each other without a gap, expert by expert.

    All tensors are of one dtype of :data:`~moxe_plugin.nn.native.library.SUFFIXES`, and
    on the CPU. Those of bfloat16 are computed in float32.

    :param flat: *Shape:* ``(C,M)``.
    :param window: The K-1 inputs before each sequence; zeros if ``None``. *Shape:*
        ``(E*N,K-1,M)``.
    :param weight: *Shape:* ``(E,K,M)``.
    :param bias: *Shape:* ``(E,M)``.
    :param seq_lens: The rows of each sequence, 0 allowed: E * N of them, C in all.
    :param activates: Whether to apply SiLU to the results.

    :returns: *Shape:* ``(C,M)``.

    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    return _CausalConv.apply(  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped
        flat, window, weight, bias, array("q", seq_lens), activates
    )


class ConvInputs(NamedTuple):
    """What a convolution reads; see :func:`causal_conv`."""

    flat: Tensor
    """Its last stride is 1; rows may lie apart. *Shape:* ``(C,M)``."""

    window: Tensor | None
    """Contiguous. *Shape:* ``(E*N,K-1,M)``."""

    weight: Tensor
    """Contiguous. *Shape:* ``(E,K,M)``."""

    bias: Tensor
    """Contiguous. *Shape:* ``(E,M)``."""


class ConvGradients(NamedTuple):
    """The gradients of :class:`ConvInputs`; ``None`` where none was wanted."""

    flat: Tensor | None
    window: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def convolve_rows(
    inputs: ConvInputs, seq_lens: array[int], *, activates: bool
) -> Tensor:
    """Compute :func:`causal_conv` without a gradient.

    :param inputs: What it reads.
    :param seq_lens: As there.
    :param activates: As there.

    :returns: *Shape:* ``(C,M)``.
    """
    flat = inputs.flat
    out = flat.new_empty(flat.shape)

    _call("forward", seq_lens, activates, inputs, out, numbers=(flat.stride(0),))

    return out


def convolve_rows_backward(
    grad: Tensor,
    inputs: ConvInputs,
    seq_lens: array[int],
    *,
    activates: bool,
    wants: Sequence[bool] = (True, False, True, True),
    onto: Tensor | None = None,
) -> ConvGradients:
    """Compute the gradients of :func:`convolve_rows`.

    :param grad: That of the result; its last stride is 1. *Shape:* ``(C,M)``.
    :param inputs: As there.
    :param seq_lens: As there.
    :param activates: As there.
    :param wants: Of which of the inputs.
    :param onto: What the gradient of ``flat`` is added to in place, if it is wanted;
        contiguous. *Shape:* ``(C,M)``.

    :returns: The gradients; ``onto`` is the first one.
    """
    flat, window, weight, bias = inputs
    wants_flat, wants_window, *wants_parameters = wants

    grad_window = None
    if wants_window and window is not None:
        grad_window = torch.empty_like(window)
    grad_weight, grad_bias = None, None
    if any(wants_parameters):
        grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)

    grad_flat = None
    if wants_flat:
        grad_flat = flat.new_empty(flat.shape) if onto is None else onto

    grads = ConvGradients(grad_flat, grad_window, grad_weight, grad_bias)
    _call(
        "backward",
        seq_lens,
        activates,
        inputs,
        *(grad, *grads),
        numbers=(flat.stride(0), grad.stride(0), int(onto is not None)),
    )

    return grads


class _CausalConv(Function):
    @staticmethod
    @override
    def forward(
        ctx: Any,
        flat: Tensor,
        window: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        seq_lens: array[int],
        activates: bool,
    ) -> Tensor:
        inputs = ConvInputs(
            _join_channels(flat),
            None if window is None else window.contiguous(),
            *(weight.contiguous(), bias.contiguous()),
        )

        ctx.save_for_backward(*inputs)
        ctx.seq_lens, ctx.activates = seq_lens, activates

        return convolve_rows(inputs, seq_lens, activates=activates)

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = convolve_rows_backward(
            _join_channels(grad),
            *(ConvInputs(*ctx.saved_tensors), ctx.seq_lens),
            activates=ctx.activates,
            wants=ctx.needs_input_grad[:4],
        )

        return *grads, None, None


def _join_channels(flat: Tensor) -> Tensor:
    # Rows may lie apart, as those of a chunk do.
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _call(
    direction: str,
    seq_lens: array[int],
    activates: bool,
    inputs: ConvInputs,
    *others: Tensor | None,
    numbers: tuple[int, ...],
) -> None:
    num_experts, num_taps, dim = inputs.weight.shape
    num_runs = len(seq_lens) // num_experts
    shape = (num_experts, num_runs, num_taps, dim, int(activates), *numbers)

    function = find_function(
        "causal_conv", f"moxe_conv_{direction}_{SUFFIXES[inputs.flat.dtype]}"
    )

    # Each tensor lives until the call returns: the caller holds them.
    function(
        (ctypes.c_int64 * len(shape))(*shape),
        ctypes.c_int(torch.get_num_threads()),
        ctypes.c_void_p(seq_lens.buffer_info()[0]),
        *pointers_to(*inputs, *others),
    )
