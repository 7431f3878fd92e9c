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
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moxe_plugin.nn.native.causal_squares import (
    BLOCK,
    Sequences,
    Squares,
    multiply_into_lower,
    multiply_lower,
)
from moxe_plugin.nn.native.library import load_library
from moxe_plugin.nn.padding import EMPTY

_SUFFIXES: Final = {torch.float32: "float", torch.float64: "double"}


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
