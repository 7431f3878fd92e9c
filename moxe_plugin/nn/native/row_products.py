"""Products of the rows of experts in C++, see :mod:`moxe_plugin.nn.native.products`."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from torch import Tensor

from moxe_plugin.nn.native.products import (
    check_result,
    find_halves,
    multiply_described,
    round_into,
    sums_of,
)


def multiply_rows(
    rows: Tensor,
    weight: Tensor,
    out: Tensor,
    counts: Sequence[int],
    *,
    adds: bool = False,
) -> None:
    """Multiply the rows of each expert by its weights, one for each group of channels.

    :param rows: Sorted by expert, as a factor of a
        :class:`~moxe_plugin.nn.native.products.Product`. *Shape:* ``(C,G*in)``.
    :param weight: Likewise. *Shape:* ``(E,G,in,out)``.
    :param out: Contiguous. *Shape:* ``(C,G*out)``.
    :param counts: The number of rows of each expert, C in all.
    :param adds: As for :func:`~moxe_plugin.nn.native.products.multiply_all`.

    :raises ValueError: ``out`` is of another type or layout.
    """
    check_result(out)
    num_groups, in_dim, out_dim = weight.shape[1:]
    row, column = rows.stride()
    sums = sums_of(out, (rows, weight), in_dim, keeps=adds)
    address, weight_address, out_address = _find_addresses(rows, weight, sums)
    numbers = array("q")

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

    multiply_described(numbers, halves=find_halves(rows, weight, sums), adds=adds)
    round_into(out, sums)


def multiply_columns(
    lhs: Tensor, rhs: Tensor, out: Tensor, counts: Sequence[int]
) -> None:
    """Compute each expert's ``lhs^T rhs`` over its rows; 0 for one without a row.

    :param lhs: Sorted by expert, as a factor of a
        :class:`~moxe_plugin.nn.native.products.Product`. *Shape:* ``(C,G*in)``.
    :param rhs: Likewise. *Shape:* ``(C,G*out)``.
    :param out: Its last stride is 1; as a rule large, and not read soon. *Shape:*
        ``(E,G,in,out)``.
    :param counts: The number of rows of each expert, C in all.

    :raises ValueError: ``out`` is of another type or layout.
    """
    check_result(out)
    num_groups, in_dim, out_dim = out.shape[1:]
    sums = sums_of(out, (lhs, rhs), max(counts, default=0))
    address, rhs_address, out_address = _find_addresses(lhs, rhs, sums)
    numbers = array("q")

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

    multiply_described(numbers, halves=find_halves(lhs, rhs, sums), streams=True)
    round_into(out, sums)


def _find_addresses(*tensors: Tensor) -> list[int]:
    return [x.data_ptr() for x in tensors]
