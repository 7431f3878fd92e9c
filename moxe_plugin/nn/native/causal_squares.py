"""Causal squares ``(S,S)`` of sequences in rows, and their products.

What lies above the diagonal is neither computed nor read, but for what is next to it.
No gradients here. Where products in C++ multiply bfloat16, rows may be it, beside
squares of float32, which are rounded to it where they are multiplied by rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Final, NamedTuple

import torch
from torch import Tensor

from moxe_plugin.nn.native.products import (
    Product,
    Triangle,
    find_halves,
    multiply_described,
    round_into,
    sums_of,
)
from moxe_plugin.nn.products import multiply_all, runs_native

_BLOCK: Final = 56
"""The most rows of a square that torch multiplies at a time."""


class Sequences(NamedTuple):
    """Which of C rows are a sequence."""

    begins: list[int]
    """The first row of each."""

    lens: list[int]
    """The length of each, 0 allowed. Rows of no sequence are padding."""

    def rows_like(self, rows: Tensor) -> Tensor:
        """Make a tensor in which padding is 0, and the rest is not set.

        :param rows: *Shape:* ``(C,…)``.

        :returns: As ``rows``.
        """
        has_padding = sum(self.lens) < rows.size(0)

        return torch.zeros_like(rows) if has_padding else torch.empty_like(rows)


class Squares:
    """The squares ``(H,S,S)`` of sequences, one after the other.

    :param seqs: The sequences; those of length 0 are left out.
    :param num_heads: The number of heads H.
    """

    def __init__(self, seqs: Sequences, num_heads: int) -> None:
        self.num_heads = num_heads
        self.begins = [b for b, n in zip(*seqs, strict=True) if n > 0]
        self.lens = [n for n in seqs.lens if n > 0]

        ends = list(accumulate(num_heads * n**2 for n in self.lens))
        self.size = ends[-1] if ends else 0
        self.offsets = [0, *ends][: len(self.lens)]

    def places(self) -> Iterator[tuple[int, int, int]]:
        """List the squares.

        :yields: Of each: its sequence's first row and length, and its offset.
        """
        yield from zip(self.begins, self.lens, self.offsets, strict=True)


class LowerProduct(NamedTuple):
    """The lower halves of squares, times the rows of their sequences and heads."""

    flat: Tensor
    """The squares, 0 beyond the diagonal as far as ``kBeyondDiagonal`` of the C++ code
    says."""

    rows: Tensor
    """Contiguous. *Shape:* ``(C,H,D)``."""

    out: Tensor
    """Where the results go; contiguous. *Shape:* ``(C,H,D)``."""

    transposed: bool = False
    """Whether to multiply by the transposed squares."""


def multiply_into_lower(
    lhs: Tensor, rhs: Tensor, flat: Tensor, squares: Squares
) -> None:
    """Compute ``lhs rhs^T`` of each sequence and head, as far as the diagonal at least.

    :param lhs: Contiguous. *Shape:* ``(C,H,D)``.
    :param rhs: Contiguous. *Shape:* ``(C,H,D)``.
    :param flat: Where the squares go.
    :param squares: Which squares.
    """
    if not runs_native(lhs, rhs, flat, mixes=True):
        multiply_all(
            [
                Product(x[:, begin:end], y[:, :end].mT, square[:, begin:end, :end])
                for x, y, square in zip(
                    _by_head(lhs, squares),
                    _by_head(rhs, squares),
                    _split(flat, squares),
                    strict=True,
                )
                for begin, end in _blocks(square.size(-1))
            ]
        )

        return

    num_heads, dim = lhs.shape[1:]
    width = num_heads * dim
    numbers = array("q")
    (address, size), (rhs_address, rhs_size), (out_address, out_size) = (
        (x.data_ptr(), x.element_size()) for x in (lhs, rhs, flat)
    )

    for first, n, offset in squares.places():
        numbers.extend(
            (
                *(num_heads, n, n, dim),
                *(address + size * first * width, dim, width, 1),
                *(rhs_address + rhs_size * first * width, dim, 1, width),
                *(out_address + out_size * offset, n * n, n),
            )
        )

    multiply_described(
        numbers,
        triangles=array("q", [Triangle.LOWER_RESULT]) * len(squares.lens),
        halves=find_halves([(lhs, rhs, flat)], [flat]),
    )


def multiply_lower(products: Sequence[LowerProduct], squares: Squares) -> None:
    """Multiply the lower half of each square by the rows of its sequence and head.

    :param products: What to multiply, all at once; squares of one type, rows of one,
        and results of one.
    :param squares: Which squares.
    """
    if not runs_native(*(x for y in products for x in y[:3]), mixes=True):
        multiply_all([x for y in products for x in _cut(y, squares)])

        return

    numbers, triangles = array("q"), array("q")
    # What holds the sums of results
    all_sums = []

    for flat, rows, out, transposed in products:
        num_heads, dim = rows.shape[1:]
        width = num_heads * dim
        sums = sums_of(out, (flat, rows), max(squares.lens, default=0), keeps=True)
        all_sums.append(sums)
        (address, size), (rhs_address, rhs_size), (out_address, out_size) = (
            (x.data_ptr(), x.element_size()) for x in (flat, rows, sums)
        )

        for first, n, offset in squares.places():
            numbers.extend(
                (
                    *(num_heads, n, dim, n),
                    *(address + size * offset, n * n),
                    *((1, n) if transposed else (n, 1)),
                    *(rhs_address + rhs_size * first * width, dim, width, 1),
                    *(out_address + out_size * first * width, dim, width),
                )
            )

        triangle = Triangle.UPPER_LEFT if transposed else Triangle.LOWER_LEFT
        triangles.extend([triangle] * len(squares.lens))

    halves = find_halves([x[:3] for x in products], all_sums)
    multiply_described(numbers, triangles=triangles, halves=halves)

    for product, sums in zip(products, all_sums, strict=True):
        round_into(product.out, sums)


def _cut(product: LowerProduct, squares: Squares) -> Iterator[Product]:
    # Some rows of each square, and what they read.
    flat, rows, out, transposed = product

    for square, x, y in zip(
        _split(flat, squares),
        _by_head(rows, squares),
        _by_head(out, squares),
        strict=True,
    ):
        for begin, end in _blocks(square.size(-1)):
            result = y[:, begin:end]
            if transposed:
                columns = square[:, begin:, begin:end].tril()
                yield Product(columns.mT, x[:, begin:], result)
            else:
                yield Product(
                    square[:, begin:end, :end].tril(begin), x[:, :end], result
                )


def _split(flat: Tensor, squares: Squares) -> Iterator[Tensor]:
    # One (H,S,S) of each sequence.
    for _, n, offset in squares.places():
        size = squares.num_heads * n * n
        yield flat[offset : offset + size].view(-1, n, n)


def _by_head(rows: Tensor, squares: Squares) -> Iterator[Tensor]:
    # (C,H,D) -> (H,S,D) of each sequence
    for first, n, _ in squares.places():
        yield rows[first : first + n].transpose(0, 1)


def _blocks(n: int) -> Iterator[tuple[int, int]]:
    # Equal ones, which are as few, and compute less above the diagonal.
    size = -(-n // -(-n // _BLOCK))

    return ((begin, min(begin + size, n)) for begin in range(0, n, size))
