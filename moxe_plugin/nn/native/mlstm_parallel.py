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
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moxe_plugin.nn.native.library import load_library
from moxe_plugin.nn.native.products import Product
from moxe_plugin.nn.padding import EMPTY
from moxe_plugin.nn.products import multiply_all

_BLOCK: Final = 64
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

        squares = _Squares(seqs, num_heads)
        weights = q.new_empty(squares.size)
        multiply_all(
            [
                Product(q_seq[:, rows], k_seq[:, :end].mT, square[:, rows, :end])
                for q_seq, k_seq, square in zip(
                    *(squares.by_seq(x) for x in (q, k)),
                    squares.split(weights),
                    strict=True,
                )
                for rows, end in _blocks(q_seq.size(1))
            ]
        )

        # a, its maximum, m, the sum of weights, the normaliser
        stats = [q.new_zeros(num_rows, num_heads) for _ in range(5)]
        stats[-1].fill_(1)
        _call("weigh", q, squares, limits, gates, weights, *stats)

        hidden = torch.zeros_like(q)
        _multiply_lower(weights, v, hidden, squares)
        hidden /= stats[-1].unsqueeze(-1)

        ctx.save_for_backward(q, k, v, gates, weights, hidden, *stats)
        ctx.squares, ctx.limits = squares, limits

        return hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, gates, weights, hidden, *stats = ctx.saved_tensors
        squares: _Squares = ctx.squares
        *stats, normalizer = stats

        grad_numerator = grad_hidden / normalizer.unsqueeze(-1)
        grad_normalizer = -(grad_numerator * hidden).sum(dim=-1)

        grads = torch.empty_like(weights)
        multiply_all(
            [
                Product(grad_seq[:, rows], v_seq[:, :end].mT, square[:, rows, :end])
                for grad_seq, v_seq, square in zip(
                    *(squares.by_seq(x) for x in (grad_numerator, v)),
                    squares.split(grads),
                    strict=True,
                )
                for rows, end in _blocks(v_seq.size(1))
            ]
        )

        grad_gates = torch.zeros_like(gates)
        _call(
            "weigh_backward",
            *(q, squares, ctx.limits, gates, weights),
            *(*stats, grad_normalizer, grads, grad_gates),
        )

        grad_q, grad_k, grad_v = (torch.zeros_like(q) for _ in range(3))
        _multiply_lower(grads, k, grad_q, squares)
        _multiply_lower(grads, q, grad_k, squares, transposed=True)
        _multiply_lower(weights, grad_numerator, grad_v, squares, transposed=True)

        return None, None, grad_q, grad_k, grad_v, grad_gates


class _Squares:
    # The squares (H,S,S) of sequences, one after the other.

    def __init__(self, seqs: Sequences, num_heads: int) -> None:
        self.num_heads = num_heads
        self.begins = [b for b, n in zip(*seqs, strict=True) if n > 0]
        self.lens = [n for n in seqs.lens if n > 0]

        ends = list(accumulate(num_heads * n**2 for n in self.lens))
        self.size = ends[-1] if ends else 0
        self.offsets = [0, *ends][: len(self.lens)]

    def split(self, flat: Tensor) -> list[Tensor]:
        # H * S * S numbers -> (H,S,S)
        parts = flat.split([self.num_heads * n**2 for n in self.lens])

        return [
            part.view(self.num_heads, n, n)
            for part, n in zip(parts, self.lens, strict=True)
        ]

    def by_seq(self, rows: Tensor) -> list[Tensor]:
        # (C,H,D) -> (H,S,D)
        heads = rows.transpose(0, 1)

        return [
            heads[:, begin : begin + n]
            for begin, n in zip(self.begins, self.lens, strict=True)
        ]


def _blocks(seq_len: int) -> Iterator[tuple[slice, int]]:
    # Rows of a square, and where those end that are read.
    for begin in range(0, seq_len, _BLOCK):
        end = min(begin + _BLOCK, seq_len)

        yield slice(begin, end), end


def _multiply_lower(
    flat: Tensor, rows: Tensor, out: Tensor, squares: _Squares, transposed: bool = False
) -> None:
    products = []

    for square, x, y in zip(
        squares.split(flat), squares.by_seq(rows), squares.by_seq(out), strict=True
    ):
        for block, end in _blocks(x.size(1)):
            if transposed:
                # Columns of the square, from the block that the diagonal cuts on.
                lhs, rhs = square[:, block.start :, block].mT, x[:, block.start :]
            else:
                lhs, rhs = square[:, block, :end], x[:, :end]

            products.append(Product(lhs, rhs, y[:, block]))

    multiply_all(products)


def _call(
    name: str,
    q: Tensor,
    squares: _Squares,
    limits: NormalizerLimits,
    *tensors: Tensor,
) -> None:
    function = load_library("mlstm_parallel")[f"moxe_mlstm_{name}_{_SUFFIXES[q.dtype]}"]

    lists = [_int64_array(x) for x in (squares.begins, squares.lens, squares.offsets)]
    constants = (1 / math.sqrt(q.size(-1)), EMPTY, *limits)

    # The tensors live until the call returns: the caller holds them.
    function(
        _int64_array((len(squares.lens), squares.num_heads, _BLOCK)),
        (ctypes.c_double * len(constants))(*constants),
        ctypes.c_int(torch.get_num_threads()),
        *lists,
        *(ctypes.c_void_p(x.data_ptr()) for x in tensors),
    )


def _int64_array(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(numbers))(*numbers)
