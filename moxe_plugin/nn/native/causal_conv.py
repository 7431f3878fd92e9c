"""The depthwise causal convolution over time, in C++.

The same function as that of :class:`~moxe_plugin.nn.layers.CausalConv`, which has the
equation. The sums of its gradients are added in an order that depends neither on the
order of execution nor on the number of threads.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override

from moxe_plugin.nn.native.library import SUFFIXES, find_function


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
        flat = _join_channels(flat)
        window = None if window is None else window.contiguous()
        weight, bias = weight.contiguous(), bias.contiguous()
        out = flat.new_empty(flat.shape)

        _call(
            *("forward", seq_lens, activates),
            *(flat, window, weight, bias, out),
            strides=(flat.stride(0),),
        )

        ctx.save_for_backward(flat, window, weight, bias)
        ctx.seq_lens, ctx.activates = seq_lens, activates

        return out

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, window, weight, bias = ctx.saved_tensors
        needs_flat, needs_window, *needs_parameters = ctx.needs_input_grad[:4]

        grad_flat = flat.new_empty(flat.shape) if needs_flat else None
        grad_window = torch.empty_like(window) if needs_window else None
        grad_weight, grad_bias = None, None
        if any(needs_parameters):
            grad_weight = torch.empty_like(weight)
            grad_bias = weight.new_empty(weight.size(0), weight.size(2))

        grad = _join_channels(grad)
        _call(
            *("backward", ctx.seq_lens, ctx.activates),
            *(flat, window, weight, bias, grad),
            *(grad_flat, grad_window, grad_weight, grad_bias),
            strides=(flat.stride(0), grad.stride(0)),
        )

        return grad_flat, grad_window, grad_weight, grad_bias, None, None


def _join_channels(flat: Tensor) -> Tensor:
    # Rows may lie apart, as those of a chunk do.
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _call(
    direction: str,
    seq_lens: array[int],
    activates: bool,
    flat: Tensor,
    window: Tensor | None,
    weight: Tensor,
    *others: Tensor | None,
    strides: tuple[int, ...],
) -> None:
    num_experts, num_taps, dim = weight.shape
    num_runs = len(seq_lens) // num_experts
    shape = (num_experts, num_runs, num_taps, dim, int(activates), *strides)

    function = find_function(
        "causal_conv", f"moxe_conv_{direction}_{SUFFIXES[flat.dtype]}"
    )

    # Each tensor lives until the call returns: the caller holds them.
    pointers = [
        ctypes.c_void_p(None if x is None else x.data_ptr())
        for x in (flat, window, weight, *others)
    ]

    function(
        (ctypes.c_int64 * len(shape))(*shape),
        ctypes.c_int(torch.get_num_threads()),
        ctypes.c_void_p(seq_lens.buffer_info()[0]),
        *pointers,
    )
