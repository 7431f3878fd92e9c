"""Layer normalisation of rows per head, scaled by the weights of their experts, in C++.

The same function as that of :class:`~moxe_plugin.nn.layers.ScaleNorm`, which has the
equation. The sums of its gradients are added in an order that does not depend on the
number of threads.
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

from moxe_plugin.nn.native.library import SUFFIXES, find_function, pointers_to


def scale_norm(
    flat: Tensor, weight: Tensor, counts: Sequence[int], num_heads: int, eps: float
) -> Tensor:
    """Normalise each head of each row, and scale it.

    Both tensors are of one dtype of :data:`~moxe_plugin.nn.native.library.SUFFIXES`,
    and on the CPU. Those of bfloat16 are computed in float32.

    :param flat: Sorted by expert. *Shape:* ``(C,M)``.
    :param weight: *Shape:* ``(E,M)``.
    :param counts: The number of rows of each expert, C in all.
    :param num_heads: The number of heads, which divides M.
    :param eps: Is added to the variance.

    :returns: *Shape:* ``(C,M)``.

    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    return _ScaleNorm.apply(flat, weight, array("q", counts), num_heads, eps)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped


def norm_rows(
    flat: Tensor,
    weight: Tensor,
    counts: array[int],
    num_heads: int,
    eps: float,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`scale_norm` without a gradient.

    :param flat: As there, contiguous. *Shape:* ``(C,M)``.
    :param weight: Contiguous. *Shape:* ``(E,M)``.
    :param counts: As there.
    :param num_heads: As there.
    :param eps: As there.
    :param residual: Rows that are added; contiguous. *Shape:* ``(C,M)``.

    :returns: The rows ``(C,M)``, and the mean and one over the deviation of each head,
        ``(C,H,2)``, which :func:`norm_rows_backward` wants.
    """
    out = torch.empty_like(flat)
    wide = torch.promote_types(flat.dtype, torch.float32)
    stats = flat.new_empty(flat.size(0), num_heads, 2, dtype=wide)

    _call(
        *("forward", counts, num_heads, eps),
        *(flat, weight, residual, out, stats),
    )

    return out, stats


def norm_rows_backward(
    grad: Tensor,
    flat: Tensor,
    weight: Tensor,
    stats: Tensor,
    counts: array[int],
    eps: float,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of :func:`norm_rows`.

    :param grad: That of the rows; contiguous. *Shape:* ``(C,M)``.
    :param flat: As there.
    :param weight: As there.
    :param stats: What it has returned.
    :param counts: As there.
    :param eps: As there.
    :param residual: What is added to the gradient of ``flat``; contiguous. *Shape:*
        ``(C,M)``.

    :returns: Those of ``flat`` and ``weight``.
    """
    grad_flat, grad_weight = torch.empty_like(flat), torch.empty_like(weight)

    _call(
        "backward",
        *(counts, stats.size(1), eps, flat),
        *(weight, stats, grad, residual, grad_flat, grad_weight),
    )

    return grad_flat, grad_weight


class _ScaleNorm(Function):
    @staticmethod
    @override
    def forward(
        ctx: Any,
        flat: Tensor,
        weight: Tensor,
        counts: array[int],
        num_heads: int,
        eps: float,
    ) -> Tensor:
        flat, weight = flat.contiguous(), weight.contiguous()
        out, stats = norm_rows(flat, weight, counts, num_heads, eps)

        ctx.save_for_backward(flat, weight, stats)
        ctx.counts, ctx.eps = counts, eps

        return out

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, stats = ctx.saved_tensors

        grads = norm_rows_backward(
            grad.contiguous(), flat, weight, stats, ctx.counts, ctx.eps
        )

        return *grads, None, None, None


def _call(
    direction: str,
    counts: array[int],
    num_heads: int,
    eps: float,
    flat: Tensor,
    *others: Tensor | None,
) -> None:
    shape = len(counts), num_heads, flat.size(1) // num_heads

    function = find_function(
        "scale_norm", f"moxe_norm_{direction}_{SUFFIXES[flat.dtype]}"
    )

    # Each tensor lives until the call returns: the caller holds them.
    function(
        (ctypes.c_int64 * len(shape))(*shape),
        ctypes.c_void_p(counts.buffer_info()[0]),
        ctypes.c_double(eps),
        ctypes.c_int(torch.get_num_threads()),
        *pointers_to(flat, *others),
    )
