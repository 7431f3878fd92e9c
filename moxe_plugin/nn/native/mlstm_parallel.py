"""The mLSTM cell over whole sequences on a CPU: its parallel form, without padding.

The same function as :func:`~moxe_plugin.nn.mlstm_cell.mlstm_parallel`, whose docstring
has the equations, with an empty memory before and none wanted after. Sequences of any
lengths stand one after the other in rows, heads side by side in a row, as the products
around the cell make and read them. What lies above the diagonal is not computed, but
for blocks that it cuts.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moxe_plugin.nn.native.library import load_library
from moxe_plugin.nn.padding import EMPTY
from moxe_plugin.nn.ragged_products import multiply_parts

BLOCK: Final = 64
"""Rows of the squares that are multiplied at a time."""

_SUFFIXES: Final = {torch.float32: "float", torch.float64: "double"}


class Sequences(NamedTuple):
    """Which of C rows are a sequence."""

    begins: list[int]
    """The first row of each."""

    lens: list[int]
    """The length of each, 0 allowed. Rows of no sequence are padding."""


class NormalizerLimits(NamedTuple):
    """The numbers of the cell's normaliser, see :mod:`moxe_plugin.nn.mlstm_cell`."""

    max_exponent: float
    """``MAX_EXPONENT``."""

    eps: float
    """``NORMALIZER_EPS``."""


def mlstm_parallel_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    seqs: Sequences,
    limits: NormalizerLimits,
) -> Tensor:
    """Run the cell, in time and space quadratic in the length of a sequence.

    All are float32 or all float64, on the CPU.

    :param q: The queries. *Shape:* ``(C,H,D)``.
    :param k: The keys. *Shape:* ``(C,H,D)``.
    :param v: The values. *Shape:* ``(C,H,D)``.
    :param gates: The pre-activations of the input gates, then those of the forget
        gates. *Shape:* ``(C,2H)``.
    :param seqs: Where the sequences are.
    :param limits: The cell's constants.

    :returns: The outputs, 0 at padding. *Shape:* ``(C,H,D)``.

    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    return _MLSTMParallel.apply(seqs, limits, q, k, v, gates)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped


class _MLSTMParallel(Function):
    @staticmethod
    def forward(
        ctx: Any, seqs: Sequences, limits: NormalizerLimits, *inputs: Tensor
    ) -> Tensor:
        q, k, v, gates = (x.contiguous() for x in inputs)
        num_rows, num_heads, _ = q.shape

        squares = Squares(seqs, num_heads)
        weights = q.new_empty(squares.size)
        multiply_into_lower(q, k, weights, squares)

        # a, its maximum, m, the sum of weights, the normaliser
        stats = [q.new_zeros(num_rows, num_heads) for _ in range(5)]
        stats[-1].fill_(1)
        _call("weigh", q, squares, limits, gates, weights, *stats)

        hidden = torch.zeros_like(q)
        multiply_lower(weights, v, hidden, squares)
        hidden /= stats[-1].unsqueeze(-1)

        ctx.save_for_backward(q, k, v, gates, weights, hidden, *stats)
        ctx.squares, ctx.limits = squares, limits

        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, gates, weights, hidden, *stats = ctx.saved_tensors
        squares: Squares = ctx.squares
        *stats, normalizer = stats

        grad_numerator = (grad_hidden / normalizer.unsqueeze(-1)).contiguous()
        grad_normalizer = -(grad_numerator * hidden).sum(dim=-1)

        grads = torch.empty_like(weights)
        multiply_into_lower(grad_numerator, v, grads, squares)

        grad_gates = torch.zeros_like(gates)
        _call(
            "weigh_backward",
            *(q, squares, ctx.limits, gates, weights),
            *(*stats, grad_normalizer, grads, grad_gates),
        )

        grad_q, grad_k, grad_v = (torch.zeros_like(q) for _ in range(3))
        multiply_lower(grads, k, grad_q, squares)
        multiply_lower(grads, q, grad_k, squares, transposed=True)
        multiply_lower(weights, grad_numerator, grad_v, squares, transposed=True)

        return None, None, grad_q, grad_k, grad_v, grad_gates


class Squares:
    # The squares (H,S,S) of sequences, one after the other.

    def __init__(self, seqs: Sequences, num_heads: int) -> None:
        self.num_heads = num_heads
        self.begins = [b for b, n in zip(*seqs, strict=True) if n > 0]
        self.lens = [n for n in seqs.lens if n > 0]

        ends = list(accumulate(num_heads * n**2 for n in self.lens))
        self.size = ends[-1] if ends else 0
        self.offsets = [0, *ends][: len(self.lens)]

    def blocks(self) -> Iterator[tuple[int, int, int, int, int]]:
        # Of each square: its sequence's first row and length, its offset, and from
        # where to where some of its rows go. What they read ends where they do.
        for first, n, offset in zip(self.begins, self.lens, self.offsets, strict=True):
            for begin in range(0, n, BLOCK):
                yield first, n, offset, begin, min(begin + BLOCK, n)


def multiply_into_lower(
    lhs: Tensor, rhs: Tensor, flat: Tensor, squares: Squares
) -> None:
    # lhs rhs^T of each sequence and head, as far as the diagonal's blocks.
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
    # The lower half of each square times the rows of its sequence and head.
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


def _call(
    name: str,
    q: Tensor,
    squares: Squares,
    limits: NormalizerLimits,
    *tensors: Tensor,
) -> None:
    function = load_library("mlstm_parallel")[f"moxe_mlstm_{name}_{_SUFFIXES[q.dtype]}"]

    lists = [_int64_array(x) for x in (squares.begins, squares.lens, squares.offsets)]
    constants = (1 / math.sqrt(q.size(-1)), EMPTY, *limits)

    # The tensors live until the call returns: the caller holds them.
    function(
        _int64_array((len(squares.lens), squares.num_heads, BLOCK)),
        (ctypes.c_double * len(constants))(*constants),
        ctypes.c_int(torch.get_num_threads()),
        *lists,
        *(ctypes.c_void_p(x.data_ptr()) for x in tensors),
    )


def _int64_array(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(numbers))(*numbers)
