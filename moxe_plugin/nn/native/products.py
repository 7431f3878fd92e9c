"""Products of float32 matrices on CPUs with AVX-512, in C++.

torch's own go through MKL, which on processors of other makers than Intel uses vectors
of half the width. Beyond that, all products of a call share the threads, factors and
results may lie in rows of larger matrices, and each element is summed in an order that
depends on the inner dimension alone: not on how many rows there are, nor on the number
of threads.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moxe_plugin.nn.native.library import load_library


class Product(NamedTuple):
    """What is multiplied: matrices, or B of them each. Float32, on the CPU."""

    lhs: Tensor
    """*Shape:* ``([B,]m,k)``, any strides."""

    rhs: Tensor
    """*Shape:* ``([B,]k,n)``, any strides."""

    out: Tensor
    """Where the result goes. *Shape:* ``([B,]m,n)``, its last stride 1."""


def multiply_all(
    products: Sequence[Product], *, adds: bool = False, streams: bool = False
) -> None:
    """Compute products, all at once.

    :param products: What to multiply.
    :param adds: Whether to add to ``out`` what is computed.
    :param streams: Whether to write past the caches, for results that are not read
        soon; where a result is not complete at once, this changes nothing.

    :raises MemoryError: There is no memory for copies of factors.
    :raises NativeLibraryError: The C++ code cannot be compiled here.
    :raises ValueError: The shapes of a product do not fit, or ``out`` is of another
        type or layout.
    """
    numbers = array("q")

    for lhs, rhs, out in products:
        _check(lhs, rhs, out)

        numbers.extend(
            (
                lhs.size(0) if lhs.ndim == 3 else 1,
                *(lhs.size(-2), rhs.size(-1), lhs.size(-1)),
                *_describe(lhs),
                *_describe(rhs),
                *_describe(out)[:-1],
            )
        )

    # The tensors live until the call returns: `products` holds them.
    is_out_of_memory = load_library("products")["moxe_multiply"](
        ctypes.c_int64(len(products)),
        ctypes.c_void_p(numbers.buffer_info()[0]),
        ctypes.c_int(adds),
        ctypes.c_int(streams),
        ctypes.c_int(torch.get_num_threads()),
    )

    if is_out_of_memory:
        raise MemoryError("There is no memory for copies of the factors of a product.")


def _check(lhs: Tensor, rhs: Tensor, out: Tensor) -> None:
    if (
        lhs.shape[:-2] != rhs.shape[:-2]
        or lhs.size(-1) != rhs.size(-2)
        or out.shape != (*lhs.shape[:-1], rhs.size(-1))
        or lhs.ndim > 3
    ):
        lhs_shape, rhs_shape, out_shape = (tuple(x.shape) for x in (lhs, rhs, out))

        raise ValueError(
            "`lhs`, `rhs` and `out` must be ([B,]m,k), ([B,]k,n) and ([B,]m,n), but "
            f"are {lhs_shape}, {rhs_shape} and {out_shape} instead."
        )

    if out.dtype != torch.float32 or (out.size(-1) > 1 and out.stride(-1) != 1):
        raise ValueError(
            "`out` must be float32 with a last stride of 1, but is "
            f"{out.dtype} with strides {out.stride()} instead."
        )


def _describe(x: Tensor) -> tuple[int, int, int, int]:
    next_stride = x.stride(0) if x.ndim == 3 else 0

    return x.data_ptr(), next_stride, x.stride(-2), x.stride(-1)
