"""Products of the rows of experts in C++, see :mod:`moxe_plugin.nn.native.products`."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from moxe_plugin.nn.native.products import (
    check_result,
    find_halves,
    multiply_described,
    round_into,
    sums_of,
)


class RowProduct(NamedTuple):
    """Rows, sorted by expert, times weights of their experts, one for each group."""

    rows: Tensor
    """As a factor of a :class:`~moxe_plugin.nn.native.products.Product`. *Shape:*
    ``(C,G*in)``."""

    weight: Tensor
    """Likewise. *Shape:* ``(E,G,in,out)``."""

    out: Tensor
    """Contiguous. *Shape:* ``(C,G*out)``."""


class ColumnProduct(NamedTuple):
    """Of each expert ``lhs^T rhs`` over its rows, for each group of channels.

    It is 0 for an expert without a row.
    """

    lhs: Tensor
    """Sorted by expert, as a factor of a
    :class:`~moxe_plugin.nn.native.products.Product`. *Shape:* ``(C,G*in)``."""

    rhs: Tensor
    """Likewise. *Shape:* ``(C,G*out)``."""

    out: Tensor
    """Its last stride is 1; as a rule large, and not read soon. *Shape:*
    ``(E,G,in,out)``."""


def multiply_rows(products: Sequence[RowProduct], counts: Sequence[int]) -> None:
    """Multiply rows by the weights of their experts, all at once.

    :param products: What to multiply; rows of one type, weights of one, and results of
        one.
    :param counts: The number of rows of each expert, C in all.

    :raises ValueError: A result is of another type or layout.
    """
    numbers = array("q")
    # What holds the sums of results
    all_sums = []

    for rows, weight, out in products:
        check_result(out)
        num_groups, in_dim, out_dim = weight.shape[1:]
        row, column = rows.stride()
        sums = sums_of(out, (rows, weight), in_dim)
        all_sums.append(sums)
        address, weight_address, out_address = _find_addresses(rows, weight, sums)

        for count in counts:
            if count > 0:
                numbers.extend(
                    (
                        *(num_groups, count, out_dim, in_dim),
                        *(address, in_dim * column, row, column),
                        *(weight_address, *weight.stride()[1:]),
                        *(out_address, out_dim, sums.stride(0)),
                    )
                )

            address += rows.element_size() * count * row
            weight_address += weight.element_size() * weight.stride(0)
            out_address += sums.element_size() * count * sums.stride(0)

    _multiply(numbers, products, all_sums)


def multiply_columns(products: Sequence[ColumnProduct], counts: Sequence[int]) -> None:
    """Multiply the columns of rows of the same experts, all at once.

    :param products: What to multiply; left factors of one type, right ones of one, and
        results of one.
    :param counts: The number of rows of each expert, C in all.

    :raises ValueError: A result is of another type or layout.
    """
    numbers = array("q")
    all_sums = []

    for lhs, rhs, out in products:
        check_result(out)
        num_groups, in_dim, out_dim = out.shape[1:]
        sums = sums_of(out, (lhs, rhs), max(counts, default=0))
        all_sums.append(sums)
        address, rhs_address, out_address = _find_addresses(lhs, rhs, sums)

        for count in counts:
            numbers.extend(
                (
                    *(num_groups, in_dim, out_dim, count),
                    *(address, in_dim * lhs.stride(1), *reversed(lhs.stride())),
                    *(rhs_address, out_dim * rhs.stride(1), *rhs.stride()),
                    *(out_address, *sums.stride()[1:3]),
                )
            )

            address += lhs.element_size() * count * lhs.stride(0)
            rhs_address += rhs.element_size() * count * rhs.stride(0)
            out_address += sums.element_size() * sums.stride(0)

    _multiply(numbers, products, all_sums, streams=True)


def _multiply(
    numbers: array[int],
    products: Sequence[tuple[Tensor, Tensor, Tensor]],
    all_sums: Sequence[Tensor],
    *,
    streams: bool = False,
) -> None:
    multiply_described(numbers, halves=find_halves(products, all_sums), streams=streams)

    for (_, _, out), sums in zip(products, all_sums, strict=True):
        round_into(out, sums)


def _find_addresses(*tensors: Tensor) -> list[int]:
    return [x.data_ptr() for x in tensors]
