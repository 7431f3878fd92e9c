"""Products of matrices: in C++ where that is faster than torch's, else torch's.

The choice is the process's, not a model's; :func:`why_torch` tells what it is, and why.
The environment variable ``MOXE_PRODUCTS`` makes it. ``auto``, the default, takes C++ on
processors with AVX-512 if there is a C++ compiler, for bfloat16 only without AMX, by
which torch multiplies it; ``native`` asks for C++, ``torch`` for torch. It concerns
float32 and bfloat16 on CPUs; all else is torch's. Both compute the same up to rounding.

Under autocast to bfloat16, torch rounds factors and results. In C++, factors alone are
rounded, and results are float32.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from typing_extensions import override

from moxe_plugin.nn.autocast import recalls_autocast, remembers_autocast
from moxe_plugin.nn.native import products as native
from moxe_plugin.nn.native.library import (
    NativeLibraryError,
    is_readable,
    why_not_loaded,
)
from moxe_plugin.nn.native.products import Product
from moxe_plugin.nn.padding import widen

_CHOICES: Final = ("auto", "native", "torch")

_log: Final = logging.getLogger(__name__)


def matmul(lhs: Tensor, rhs: Tensor) -> Tensor:
    """Multiply matrices, with a gradient.

    Under autocast it computes in autocast's type, as ``@`` does; in C++, the result is
    float32 nevertheless.

    :param lhs: *Shape:* ``(…,m,k)``.
    :param rhs: With the same leading dimensions. *Shape:* ``(…,k,n)``.

    :returns: *Shape:* ``(…,m,n)``.
    """
    if not runs_native(lhs, rhs):
        return lhs @ rhs

    return _Matmul.apply(lhs, rhs)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped


def multiply(lhs: Tensor, rhs: Tensor, *, streams: bool = False) -> Tensor:
    """Multiply matrices, without a gradient.

    :param lhs: *Shape:* ``(…,m,k)``.
    :param rhs: With the same leading dimensions. *Shape:* ``(…,k,n)``.
    :param streams: Whether to write past the caches, for a result that is not read
        soon; only in C++.

    :returns: *Shape:* ``(…,m,n)``.
    """
    if not runs_native(lhs, rhs):
        return lhs @ rhs

    out = lhs.new_empty(*lhs.shape[:-1], rhs.size(-1))
    _multiply_into(out, lhs, rhs, streams=streams)

    return out


def multiply_widely(lhs: Tensor, rhs: Tensor) -> Tensor:
    """Multiply matrices, without a gradient; the result has at least 32 bits.

    Where C++ or a GPU multiplies 16 bits, it is rounded to those only.

    :param lhs: *Shape:* ``(m,k)``.
    :param rhs: *Shape:* ``(k,n)``.

    :returns: *Shape:* ``(m,n)``.
    """
    if lhs.is_cuda and lhs.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(lhs, rhs, out_dtype=torch.float32)

    if not runs_native(lhs, rhs):
        return widen(lhs @ rhs)

    out = lhs.new_empty(lhs.size(0), rhs.size(1), dtype=torch.float32)
    _multiply_into(out, lhs, rhs)

    return out


def add_product(out: Tensor, lhs: Tensor, rhs: Tensor) -> None:
    """Add a product to a matrix in place, without a gradient.

    :param out: Its last stride is 1. *Shape:* ``(m,n)``.
    :param lhs: *Shape:* ``(m,k)``.
    :param rhs: *Shape:* ``(k,n)``.
    """
    if runs_native(lhs, rhs, out, mixes=True):
        native.multiply_all([Product(lhs, rhs, out)], adds=True)
    elif out.dtype == lhs.dtype:
        # Counters of FLOPs do not know `addmm_`.
        torch.addmm(out, lhs, rhs, out=out)
    else:
        out += lhs @ rhs


def multiply_all(products: Sequence[Product]) -> None:
    """Compute products of any sizes, without a gradient.

    :param products: What to multiply, and where the results go.
    """
    # Of none, all would run in C++, and nothing could tell whether it is there.
    if products and runs_native(*(x for lhs, rhs, _ in products for x in (lhs, rhs))):
        native.multiply_all(products)

        return

    # Of whichever layout the results are, their type is settled.
    with torch.autocast("cpu", enabled=False):
        for lhs, rhs, out in products:
            if lhs.ndim == 3 and lhs.size(0) == 1:
                # Of several, some libraries make a loop.
                torch.mm(lhs[0], rhs[0], out=out[0])
            elif out.is_contiguous():
                torch.matmul(lhs, rhs, out=out)
            else:
                out.copy_(lhs @ rhs)


def runs_native(*tensors: Tensor, mixes: bool = False) -> bool:
    """Tell whether the product of some tensors runs in C++.

    :param tensors: The factors, and the result if it may be of another type.
    :param mixes: Whether they may be of several types: where a factor is bfloat16, both
        are multiplied as such.

    :returns: Whether it does.

    :raises NativeLibraryError: It was asked for, and cannot run here.
    :raises ValueError: ``MOXE_PRODUCTS`` has another value.
    """
    dtypes = {x.dtype for x in tensors}

    return (
        dtypes <= {torch.float32, torch.bfloat16}
        and (mixes or len(dtypes) == 1)
        and all(is_readable(x) for x in tensors)
        and not torch.compiler.is_compiling()
        # It counts FLOPs, or fakes tensors: it must see what is computed.
        and not is_in_torch_dispatch_mode()
        and why_torch() is None
        and follows_autocast()
        and (torch.bfloat16 not in dtypes or rounds_to_bfloat16())
    )


def rounds_factors(*tensors: Tensor) -> bool:
    """Tell whether the product of some tensors runs in C++, rounded to bfloat16.

    :param tensors: The factors.

    :returns: Whether it does: under autocast, as far as that is possible.
    """
    return torch.is_autocast_enabled("cpu") and runs_native(*tensors)


def follows_autocast() -> bool:
    """Tell whether products in C++ do what autocast on the CPU asks for.

    :returns: Whether it is off, or asks for bfloat16 where products run in C++.
    """
    return not torch.is_autocast_enabled("cpu") or (
        torch.get_autocast_dtype("cpu") == torch.bfloat16 and rounds_to_bfloat16()
    )


@cache
def why_torch() -> str | None:
    """Tell why products on the CPU are torch's, those of bfloat16 in any case.

    :returns: The reason; ``None`` if they run in C++.

    :raises NativeLibraryError: C++ was asked for, and cannot run here.
    :raises ValueError: ``MOXE_PRODUCTS`` has another value.
    """
    choice = _read_choice()

    if choice == "torch":
        return "`MOXE_PRODUCTS` is 'torch'"

    capability = torch.backends.cpu.get_cpu_capability()

    reason: str | None = None
    if capability != "AVX512":
        reason = f"they need AVX512, and torch uses {capability} here"
    else:
        reason = why_not_loaded("products")

    if reason is None:
        _log.info("Products on the CPU run in C++.")
    elif choice == "native":
        raise NativeLibraryError(
            "`MOXE_PRODUCTS` must be 'auto' or 'torch' on this machine, but is "
            f"'native': {reason}."
        )
    else:
        _log.info("Products on the CPU are torch's: %s.", reason)

    return reason


@cache
def rounds_to_bfloat16() -> bool:
    """Tell whether products of bfloat16, or of what is rounded to it, run in C++.

    :returns: Whether those of float32 do, and the processor has no AMX or C++ is asked
        for: torch's multiply bfloat16 by AMX, C++ does not.

    :raises NativeLibraryError: As :func:`why_torch`.
    :raises ValueError: As :func:`why_torch`.
    """
    return why_torch() is None and (
        _read_choice() == "native" or not torch.cpu._is_amx_tile_supported()
    )


def _read_choice() -> str:
    choice = os.environ.get("MOXE_PRODUCTS") or "auto"

    if choice not in _CHOICES:
        raise ValueError(
            f"`MOXE_PRODUCTS` must be one of {', '.join(_CHOICES)}, but is '{choice}' "
            "instead."
        )

    return choice


def _multiply_into(
    out: Tensor, lhs: Tensor, rhs: Tensor, *, streams: bool = False
) -> None:
    batch = lhs.ndim > 2

    # (…,m,n) -> (B,m,n)
    native.multiply_all(
        [Product(*(x.flatten(0, -3) if batch else x for x in (lhs, rhs, out)))],
        streams=streams,
    )


class _Matmul(Function):
    @staticmethod
    @remembers_autocast
    @override
    def forward(ctx: Any, lhs: Tensor, rhs: Tensor) -> Tensor:
        ctx.save_for_backward(lhs, rhs)

        return multiply(lhs, rhs)

    @staticmethod
    @recalls_autocast
    @override
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        lhs, rhs = ctx.saved_tensors
        needs_lhs, needs_rhs = ctx.needs_input_grad

        return (
            multiply(grad, rhs.mT) if needs_lhs else None,
            multiply(lhs.mT, grad, streams=True) if needs_rhs else None,
        )
