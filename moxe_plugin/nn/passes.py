"""Tells which passes over memory run in C++, beside the convolution and the cells."""

from __future__ import annotations

import torch
from torch import Tensor

from moxe_plugin.nn.backend import ScanBackend
from moxe_plugin.nn.native.library import NativeSource, is_readable, why_not_loaded
from moxe_plugin.nn.padding import widen
from moxe_plugin.nn.products import follows_autocast, rounds_to_bfloat16


def passes_natively(source: NativeSource, *tensors: Tensor) -> bool:
    """Tell whether a pass over some tensors, which has no backend, runs in C++.

    :param source: The C++ file.
    :param tensors: What the pass reads.

    :returns: Whether it can be compiled, and all are plain tensors on a CPU and of one
        type, not compiled, and autocast is off or what products in C++ follow.
    """
    dtype = tensors[0].dtype

    return (
        all(x.dtype == dtype and is_readable(x) for x in tensors)
        and follows_autocast()
        and not torch.compiler.is_compiling()
        and why_not_loaded(source) is None
    )


def has_native_dtype(x: Tensor) -> bool:
    """Tell whether C++ reads the numbers of a tensor as they are.

    :param x: The tensor.

    :returns: Whether they are float32 or float64, or bfloat16 on a CPU where products
        in C++ multiply it, but for compiled layers.

    :raises NativeLibraryError: ``MOXE_PRODUCTS`` asks for C++, which cannot run here.
    :raises ValueError: ``MOXE_PRODUCTS`` has another value.
    """
    if x.dtype == torch.bfloat16:
        return x.is_cpu and not torch.compiler.is_compiling() and rounds_to_bfloat16()

    return x.dtype in (torch.float32, torch.float64)


def widen_for_native(x: Tensor) -> Tensor:
    """Convert to what C++ reads: bfloat16 as it is where products in C++ multiply it.

    :param x: Any floating-point tensor.

    :returns: The same values in float32, float64 or, where that is read, bfloat16.
    """
    return x if has_native_dtype(x) else widen(x)


def runs_on_host_rows(
    backend: ScanBackend, seqs: Tensor, expert_weights: Tensor
) -> bool:
    """Tell whether a bank of experts takes its tokens without padding on a CPU.

    :param backend: The bank's choice.
    :param seqs: What sends it rows. *Shape:* ``(N,S,M)``.
    :param expert_weights: The weights of its outputs. *Shape:* ``(T,K)``.

    :returns: Whether it does: with ``auto`` and ``native``, where
        :func:`has_native_dtype` and :func:`passes_natively`. The weights of bfloat16
        are float32.
    """
    wide = torch.promote_types(seqs.dtype, torch.float32)

    return (
        backend in ("auto", "native")
        and has_native_dtype(seqs)
        and expert_weights.dtype == wide
        and is_readable(expert_weights)
        and passes_natively("row_dispatch", seqs)
    )
