"""Products of float32 matrices on CPUs with AVX-512, in C++.

torch's own go through MKL, which on processors of other makers than Intel uses vectors
of half the width. Beyond that, all products of a call share the threads, factors and
results may lie in rows of larger matrices, and each element is summed in an order that
depends on the inner dimension alone: not on how many rows there are, nor on the number
of threads.

Under autocast to bfloat16, factors are rounded to it where they are copied, if the
processor can multiply it; products, sums and results stay float32. Small products,
whose factors are not copied, round nothing.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from functools import cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from moxe_plugin.nn.native.library import find_function

NUM_NUMBERS: Final = 15
"""How many numbers tell a product."""

_BYTES: Final = 4


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

    multiply_described(numbers, adds=adds, streams=streams)


def multiply_described(
    numbers: array[int], *, adds: bool = False, streams: bool = False
) -> None:
    """Compute products that are told by numbers, for which many need no tensor each.

    :param numbers: :data:`NUM_NUMBERS` of each product, see ``Product`` in the C++
        code: B, m, n, k; then of ``lhs``, ``rhs`` and ``out`` the address, and the
        elements from one to the next matrix, row and column (of ``out``, no column).
        The caller holds the memory.
    :param adds: As for :func:`multiply_all`.
    :param streams: As for :func:`multiply_all`.

    :raises MemoryError: There is no memory for copies of factors.
    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    is_out_of_memory = find_function("products", "moxe_multiply")(
        ctypes.c_int64(len(numbers) // NUM_NUMBERS),
        ctypes.c_void_p(numbers.buffer_info()[0]),
        ctypes.c_int(rounds_now()),
        ctypes.c_int(adds),
        ctypes.c_int(streams),
        ctypes.c_int(torch.get_num_threads()),
    )

    if is_out_of_memory:
        raise MemoryError("There is no memory for copies of the factors of a product.")


def rounds_now() -> bool:
    """Tell whether factors are rounded to bfloat16.

    :returns: Whether autocast on the CPU asks for it, and the processor multiplies it.

    :raises NativeLibraryError: As :func:`rounds_to_bfloat16`.
    """
    return (
        torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and rounds_to_bfloat16()
    )


@cache
def rounds_to_bfloat16() -> bool:
    """Tell whether factors can be rounded to bfloat16 here.

    :returns: Whether the processor can multiply it.

    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    return bool(find_function("products", "moxe_multiplies_bfloat16")())


def multiply_rows(
    rows: Tensor,
    weight: Tensor,
    out: Tensor,
    counts: Sequence[int],
    *,
    adds: bool = False,
) -> None:
    """Multiply the rows of each expert by its weights, one for each group of channels.

    :param rows: Sorted by expert, float32, on the CPU. *Shape:* ``(C,G*in)``.
    :param weight: Likewise. *Shape:* ``(E,G,in,out)``.
    :param out: Contiguous. *Shape:* ``(C,G*out)``.
    :param counts: The number of rows of each expert, C in all.
    :param adds: As for :func:`multiply_all`.

    :raises ValueError: ``out`` is of another type or layout.
    """
    _check_out(out)
    num_groups, in_dim, out_dim = weight.shape[1:]
    row, column = rows.stride()
    address, weight_address, out_address = _addresses(rows, weight, out)
    numbers = array("q")

    for count in counts:
        if count > 0:
            numbers.extend(
                (
                    *(num_groups, count, out_dim, in_dim),
                    *(address, in_dim * column, row, column),
                    *(weight_address, *weight.stride()[1:]),
                    *(out_address, out_dim, out.stride(0)),
                )
            )

        address += _BYTES * count * row
        weight_address += _BYTES * weight.stride(0)
        out_address += _BYTES * count * out.stride(0)

    multiply_described(numbers, adds=adds)


def multiply_columns(
    lhs: Tensor, rhs: Tensor, out: Tensor, counts: Sequence[int]
) -> None:
    """Compute each expert's ``lhs^T rhs`` over its rows; 0 for one without a row.

    :param lhs: Sorted by expert, float32, on the CPU. *Shape:* ``(C,G*in)``.
    :param rhs: Likewise. *Shape:* ``(C,G*out)``.
    :param out: Its last stride is 1; as a rule large, and not read soon. *Shape:*
        ``(E,G,in,out)``.
    :param counts: The number of rows of each expert, C in all.

    :raises ValueError: ``out`` is of another type or layout.
    """
    _check_out(out)
    num_groups, in_dim, out_dim = out.shape[1:]
    address, rhs_address, out_address = _addresses(lhs, rhs, out)
    numbers = array("q")

    for count in counts:
        numbers.extend(
            (
                *(num_groups, in_dim, out_dim, count),
                *(address, in_dim * lhs.stride(1), *reversed(lhs.stride())),
                *(rhs_address, out_dim * rhs.stride(1), *rhs.stride()),
                *(out_address, *out.stride()[1:3]),
            )
        )

        address += _BYTES * count * lhs.stride(0)
        rhs_address += _BYTES * count * rhs.stride(0)
        out_address += _BYTES * out.stride(0)

    multiply_described(numbers, streams=True)


def _addresses(*tensors: Tensor) -> list[int]:
    return [x.data_ptr() for x in tensors]


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

    _check_out(out)


def _check_out(out: Tensor) -> None:
    if out.dtype != torch.float32 or (out.size(-1) > 1 and out.stride(-1) != 1):
        raise ValueError(
            "`out` must be float32 with a last stride of 1, but is "
            f"{out.dtype} with strides {out.stride()} instead."
        )


def _describe(x: Tensor) -> tuple[int, int, int, int]:
    next_stride = x.stride(0) if x.ndim == 3 else 0

    return x.data_ptr(), next_stride, x.stride(-2), x.stride(-1)
