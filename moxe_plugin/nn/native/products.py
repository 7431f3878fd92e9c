"""Products of float32 and bfloat16 matrices on CPUs with AVX-512, in C++.

torch's own go through MKL, which on processors of other makers than Intel uses vectors
of half the width. Beyond that, all products of a call share the threads, factors and
results may lie in rows of larger matrices, and each element is summed in an order that
depends on the inner dimension alone: not on how many rows there are, nor on the number
of threads.

Under autocast to bfloat16, factors are rounded to it where they are copied; products,
sums and results stay float32. Small products, whose factors are not copied, round
nothing.

Factors and results may be kept in bfloat16, too. Where a factor is, both are rounded to
it; sums are float32, and results are rounded once.

Pairs of bfloat16 are multiplied at once, unless the processor cannot or is faster at
multiplying each as float32, see :func:`widens_bfloat16`. The products are the same, and
their sums differ by what float32 rounds.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from enum import IntEnum, IntFlag
from functools import cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from moxe_plugin.nn.native.library import SUFFIXES, find_function
from moxe_plugin.nn.native.processor import find_vendor, multiplies_pairs

NUM_NUMBERS: Final = 15
"""How many numbers tell a product."""

_DTYPES: Final = (torch.float32, torch.bfloat16)

_MAX_DEPTH: Final = 1152
"""Up to which inner dimension a result of float32 factors is complete at once; if one
is bfloat16, up to twice as many: ``kMaxDepth`` of the C++ code."""


class Triangle(IntEnum):
    """Which half of a square matrix of a product is all that there is of it.

    Of the other half, numbers next to the diagonal are written, if it is of a result,
    or have to be 0: ``kBeyondDiagonal`` of the C++ code. The rest is not touched.
    """

    NONE = 0
    LOWER_RESULT = 1
    LOWER_LEFT = 2
    UPPER_LEFT = 3


class Rounding(IntFlag):
    """How products treat bfloat16: ``kRounds`` and ``kWidens`` of the C++ code."""

    ROUNDS = 1
    """Factors of float32 are rounded to it, too."""

    WIDENS = 2
    """It is multiplied as float32, not in pairs."""


class Product(NamedTuple):
    """What is multiplied: matrices, or B of them each, on the CPU.

    Each is float32 or bfloat16.
    """

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

    :param products: What to multiply; left factors of one type, right ones of one, and
        results of one.
    :param adds: Whether to add to ``out`` what is computed.
    :param streams: Whether to write past the caches, for results that are not read
        soon; where a result is not complete at once, this changes nothing.

    :raises MemoryError: There is no memory for copies of factors.
    :raises NativeLibraryError: The C++ code cannot be compiled here.
    :raises ValueError: The shapes or types of products do not fit, or ``out`` is of
        another type or layout.
    """
    numbers = array("q")
    # What holds the sums of results
    sums = [sums_of(x.out, x[:2], x.lhs.size(-1), keeps=adds) for x in products]
    halves = find_halves(products, sums)

    for (lhs, rhs, out), sums_of_out in zip(products, sums, strict=True):
        _check(lhs, rhs, out)

        numbers.extend(
            (
                lhs.size(0) if lhs.ndim == 3 else 1,
                *(lhs.size(-2), rhs.size(-1), lhs.size(-1)),
                *_describe(lhs),
                *_describe(rhs),
                *_describe(sums_of_out)[:-1],
            )
        )

    multiply_described(numbers, halves=halves, adds=adds, streams=streams)

    for product, sums_of_out in zip(products, sums, strict=True):
        round_into(product.out, sums_of_out)


def multiply_described(
    numbers: array[int],
    *,
    triangles: array[int] | None = None,
    halves: int = 0,
    adds: bool = False,
    streams: bool = False,
) -> None:
    """Compute products that are told by numbers, for which many need no tensor each.

    :param numbers: :data:`NUM_NUMBERS` of each product, see ``Product`` in the C++
        code: B, m, n, k; then of ``lhs``, ``rhs`` and ``out`` the address, and the
        elements from one to the next matrix, row and column (of ``out``, no column).
        The caller holds the memory.
    :param triangles: The :class:`Triangle` of each product, by default none.
    :param halves: What is bfloat16, see :func:`find_halves`.
    :param adds: As for :func:`multiply_all`.
    :param streams: As for :func:`multiply_all`.

    :raises MemoryError: There is no memory for copies of factors.
    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    num_products = len(numbers) // NUM_NUMBERS

    is_out_of_memory = find_function("products", "moxe_multiply")(
        ctypes.c_int64(num_products),
        ctypes.c_void_p(numbers.buffer_info()[0]),
        ctypes.c_void_p(triangles.buffer_info()[0] if triangles else None),
        ctypes.c_int(rounding_now()),
        ctypes.c_int(halves),
        ctypes.c_int(adds),
        ctypes.c_int(num_products if streams else 0),
        ctypes.c_int(torch.get_num_threads()),
    )

    if is_out_of_memory:
        raise MemoryError("There is no memory for copies of the factors of a product.")


def find_halves(
    products: Sequence[tuple[Tensor, Tensor, Tensor]], all_sums: Sequence[Tensor]
) -> int:
    """Tell what of products is bfloat16.

    :param products: The left factor of each, the right one, and the result.
    :param all_sums: Where each result is summed, see :func:`sums_of`.

    :returns: A bit for each, the lowest for left factors; 0 of no products.

    :raises ValueError: There are several types of one of the three.
    """
    half = torch.bfloat16
    halves = {
        (lhs.dtype == half) + 2 * (rhs.dtype == half) + 4 * (sums.dtype == half)
        for (lhs, rhs, _), sums in zip(products, all_sums, strict=True)
    }

    if len(halves) > 1:
        raise ValueError(
            "`products` must have left factors of one type, right ones of one and "
            "results of one, but has several types of one of these instead."
        )

    return max(halves, default=0)


def rounds_now() -> bool:
    """Tell whether factors are rounded to bfloat16.

    :returns: Whether autocast on the CPU asks for it.
    """
    return (
        torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


def rounding_now() -> Rounding:
    """Tell how products treat bfloat16 now.

    :returns: Whether they round to it, see :func:`rounds_now`, and widen it.
    """
    return find_rounding(rounds=rounds_now())


def find_rounding(*, rounds: bool) -> Rounding:
    """Tell how products treat bfloat16 on this processor.

    :param rounds: Whether they round float32 factors to it.

    :returns: That, and whether they widen it.
    """
    rounding = Rounding.ROUNDS if rounds else Rounding(0)

    return rounding | Rounding.WIDENS if widens_bfloat16() else rounding


def find_suffix(dtype: torch.dtype, rounding: Rounding) -> str:
    """Tell how functions end that have products of their own.

    :param dtype: The type of rows.
    :param rounding: How they treat bfloat16.

    :returns: The suffix.
    """
    rounds = dtype == torch.float32 and Rounding.ROUNDS in rounding
    suffix = "rounded" if rounds else SUFFIXES[dtype]

    if Rounding.WIDENS in rounding and (rounds or dtype == torch.bfloat16):
        return f"{suffix}_widened"

    return suffix


@cache
def widens_bfloat16() -> bool:
    """Tell whether bfloat16 is multiplied as float32, and not in pairs.

    :returns: Whether the processor cannot multiply pairs, or is Intel's: those multiply
        four vectors of float32 in the time of one of pairs, which holds two.
    """
    return find_vendor() == "GenuineIntel" or not multiplies_pairs()


def sums_of(
    out: Tensor, factors: tuple[Tensor, Tensor], inner: int, *, keeps: bool = False
) -> Tensor:
    """Find where a result is summed, from which :func:`round_into` takes it.

    Of a large inner dimension, several results are added, which bfloat16 would round
    one after the other.

    :param out: Where the result goes.
    :param factors: What is multiplied.
    :param inner: The largest inner dimension.
    :param keeps: Whether to keep what is there, or a part of it.

    :returns: ``out``, or a float32 tensor of its shape.
    """
    if out.dtype != torch.bfloat16 or inner <= _MAX_DEPTH:
        return out

    pairs = any(x.dtype == torch.bfloat16 for x in factors)
    if inner <= _MAX_DEPTH * (1 + pairs):
        return out

    if keeps:
        return out.float()

    return out.new_empty(out.shape, dtype=torch.float32)


def round_into(out: Tensor, sums: Tensor) -> None:
    """Write a result, unless it was summed there.

    :param out: Where it goes.
    :param sums: Where :func:`sums_of` had it summed.
    """
    if sums is not out:
        out.copy_(sums)


def check_result(out: Tensor) -> None:
    """Look whether a result can be written.

    :param out: Where it goes.

    :raises ValueError: It is of another type or layout.
    """
    if out.dtype not in _DTYPES or (out.size(-1) > 1 and out.stride(-1) != 1):
        raise ValueError(
            "`out` must be float32 or bfloat16 with a last stride of 1, but is "
            f"{out.dtype} with strides {out.stride()} instead."
        )


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

    for name, factor in (("lhs", lhs), ("rhs", rhs)):
        if factor.dtype not in _DTYPES:
            raise ValueError(
                f"`{name}` must be float32 or bfloat16, but is {factor.dtype} instead."
            )

    check_result(out)


def _describe(x: Tensor) -> tuple[int, int, int, int]:
    next_stride = x.stride(0) if x.ndim == 3 else 0

    return x.data_ptr(), next_stride, x.stride(-2), x.stride(-1)
