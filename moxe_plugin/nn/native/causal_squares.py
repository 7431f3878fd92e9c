"""Causal squares ``(S,S)`` of sequences in rows, and their products.

What lies above the diagonal is neither computed nor read, but for blocks that it cuts.
No gradients here. Where products in C++ multiply bfloat16, rows may be it, beside
squares of float32, which are rounded to it where they are multiplied by rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import accumulate
from typing import Final, NamedTuple

import torch
from torch import Tensor

from moxe_plugin.nn.ragged_products import multiply_parts

BLOCK: Final = 56
"""The most rows of the squares that are multiplied at a time."""


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

    def blocks(self) -> Iterator[tuple[int, int, int, int, int]]:
        """Cut the squares into some rows each.

        :yields: Of each square: its sequence's first row and length, its offset, and
            from where to where some of its rows go. What they read ends where they do.
        """
        for first, n, offset in zip(self.begins, self.lens, self.offsets, strict=True):
            # Equal ones, which are as few, and compute less above the diagonal.
            size = -(-n // -(-n // BLOCK))
            for begin in range(0, n, size):
                yield first, n, offset, begin, min(begin + size, n)


def multiply_into_lower(
    lhs: Tensor, rhs: Tensor, flat: Tensor, squares: Squares
) -> None:
    """Compute ``lhs rhs^T`` of each sequence and head, as far as the diagonal's blocks.

    :param lhs: Contiguous. *Shape:* ``(C,H,D)``.
    :param rhs: Contiguous. *Shape:* ``(C,H,D)``.
    :param flat: Where the squares go.
    :param squares: Which squares.
    """
    num_heads, dim = lhs.shape[1:]
    width = num_heads * dim
    numbers = array("q")

    for first, n, offset, begin, end in squares.blocks():
        numbers.extend(
            (
                *(num_heads, end - begin, end, dim),
                *((first + begin) * width, dim, width, 1),
                *(first * width, dim, 1, width),
                *(offset + begin * n, n * n, n),
            )
        )

    multiply_parts(numbers, lhs, rhs, flat)


def multiply_lower(
    flat: Tensor, rows: Tensor, out: Tensor, squares: Squares, transposed: bool = False
) -> None:
    """Multiply the lower half of each square by the rows of its sequence and head.

    :param flat: The squares, 0 above the diagonal in the blocks that it cuts.
    :param rows: Contiguous. *Shape:* ``(C,H,D)``.
    :param out: Where the results go; contiguous. *Shape:* ``(C,H,D)``.
    :param squares: Which squares.
    :param transposed: Whether to multiply by the transposed squares.
    """
    num_heads, dim = rows.shape[1:]
    width = num_heads * dim
    numbers = array("q")

    for first, n, offset, begin, end in squares.blocks():
        if transposed:
            # Columns of the square, from the block that the diagonal cuts on.
            inner, at, strides, read = n - begin, begin * n + begin, (1, n), begin
        else:
            inner, at, strides, read = end, begin * n, (n, 1), 0

        numbers.extend(
            (
                *(num_heads, end - begin, dim, inner),
                *(offset + at, n * n, *strides),
                *((first + read) * width, dim, width, 1),
                *((first + begin) * width, dim, width),
            )
        )

    multiply_parts(numbers, flat, rows, out)
