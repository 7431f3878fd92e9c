"""Many products at once: of parts of tensors, and of the rows of experts.

No gradients here. In C++, a product is told by numbers: a tensor for each would take
longer than a small product.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from moxe_plugin.nn.expert_products import head_outer_products, head_products
from moxe_plugin.nn.native import products as native
from moxe_plugin.nn.native import row_products
from moxe_plugin.nn.native.products import Product
from moxe_plugin.nn.native.row_products import ColumnProduct, RowProduct
from moxe_plugin.nn.products import multiply_all, runs_native


def multiply_parts(
    numbers: array[int], lhs: Tensor, rhs: Tensor, out: Tensor, *, adds: bool = False
) -> None:
    """Compute products of parts of three tensors.

    :param numbers: As for :func:`~moxe_plugin.nn.native.products.multiply_described`,
        but offsets, in elements, instead of addresses. Used up.
    :param lhs: Has the left factors.
    :param rhs: Has the right ones.
    :param out: Where the results go; contiguous. On the CPU, each of the three may be
        float32 or bfloat16 where products in C++ multiply it.
    :param adds: Whether to add them to what is there.
    """
    if runs_native(lhs, rhs, out, mixes=True):
        inner = max(numbers[3 :: native.NUM_NUMBERS], default=0)
        # Parts may leave out some of it.
        sums = native.sums_of(out, (lhs, rhs), inner, keeps=True)

        for at, x in ((4, lhs), (8, rhs), (12, sums)):
            address, size = x.data_ptr(), x.element_size()
            numbers[at :: native.NUM_NUMBERS] = array(
                "q",
                [
                    address + size * offset
                    for offset in numbers[at :: native.NUM_NUMBERS]
                ],
            )
        native.multiply_described(
            numbers, halves=native.find_halves([(lhs, rhs, out)], [sums]), adds=adds
        )
        native.round_into(out, sums)

        return

    products = []
    for i in range(0, len(numbers), native.NUM_NUMBERS):
        count, m, n, k, *parts = numbers[i : i + native.NUM_NUMBERS]
        products.append(
            Product(
                lhs.as_strided(
                    (count, m, k), parts[1:4], lhs.storage_offset() + parts[0]
                ),
                rhs.as_strided(
                    (count, k, n), parts[5:8], rhs.storage_offset() + parts[4]
                ),
                out.as_strided(
                    (count, m, n), (*parts[9:], 1), out.storage_offset() + parts[8]
                ),
            )
        )

    if adds:
        for x, y, sums in products:
            sums += x @ y
    else:
        multiply_all(products)


def multiply_rows(
    rows: Sequence[Tensor], weights: Sequence[Tensor], counts: Sequence[int]
) -> list[Tensor]:
    """Multiply rows by their expert's weights, one for each group of channels.

    :param rows: Sorted by expert, all of one type. *Shape:* ``(C,G*in)`` each.
    :param weights: By what each is multiplied. *Shape:* ``(E,G,in,out)`` each.
    :param counts: The number of rows of each expert, C in all.

    :returns: *Shape:* ``(C,G*out)`` each.
    """
    pairs = [*zip(rows, weights, strict=True)]

    if pairs and rows[0].is_cuda:
        return [head_products(x, weight, counts) for x, weight in pairs]

    outs = [x.new_empty(x.size(0), w.size(1) * w.size(3)) for x, w in pairs]

    # Of none, all would run in C++, and nothing could tell whether it is there.
    if pairs and runs_native(*rows, *weights):
        row_products.multiply_rows(
            [RowProduct(*pair, y) for pair, y in zip(pairs, outs, strict=True)], counts
        )

        return outs

    multiply_all(
        [
            Product(x, w, y)
            for (flat, weight), out in zip(pairs, outs, strict=True)
            for x, w, y in zip(
                _by_group(flat, weight, counts),
                weight,
                _by_group(out, weight, counts),
                strict=True,
            )
            if x.size(1) > 0
        ]
    )

    return outs


def multiply_columns(products: Sequence[ColumnProduct], counts: Sequence[int]) -> None:
    """Compute each expert's ``lhs^T rhs``, for each group of channels.

    :param products: What to multiply, and where the results go.
    :param counts: The number of rows of each expert, C in all.
    """
    if products and products[0].lhs.is_cuda:
        for product in products:
            head_outer_products(*product, counts)

        return

    if products and runs_native(*(x for y in products for x in y), mixes=True):
        row_products.multiply_columns(products, counts)

        return

    multiply_all(
        [
            Product(x.mT, y, z)
            for lhs, rhs, out in products
            for x, y, z in zip(
                _by_group(lhs, out, counts),
                _by_group(rhs, out, counts),
                out,
                strict=True,
            )
        ]
    )


def _by_group(rows: Tensor, weight: Tensor, counts: Sequence[int]) -> list[Tensor]:
    # (C,G*D) -> E times (G,C_e,D)
    groups = torch.unflatten(rows, 1, (weight.size(1), -1)).transpose(0, 1)

    return list(groups.split(list(counts), dim=1))
