"""The mLSTM cell over long sequences on a CPU: its chunkwise form, without padding.

The same function as :func:`~moxe_plugin.nn.mlstm_cell.mlstm_chunkwise`, with an empty
memory before and none wanted after; sequences lie in rows as for
:mod:`moxe_plugin.nn.native.mlstm_parallel`. In a chunk let ``b``
be the running sum of ``logsigmoid(f)``, ``a = i - b``, ``m'`` the stabiliser before,
``peak_t = max(m', a_1, …, a_t)``, ``kept = exp(m' - peak)``, ``decay`` the last of
them, and ``added = exp(a - peak_L) / sqrt(D)``. With primes for the memory before::

    P_ts = exp(a_s - peak_t) q_t k_s / sqrt(D) for s <= t, else 0
    h = (P v + kept q C') / norm;  norm = max(|P 1 + kept q n'|, exp(-m)) + 1e-6
    C = decay C' + (added k)^T v;  n = decay n' + sum of added k

What chunks add to memories, and what they read, are products of all chunks at once; one
after the other they only decay and add. Backward, all weights are exponentials, and the
gradients of their exponents products that are there anyway: ``da = k dk``, ``dpeak = -q
dq``; that of ``m'`` in a memory is ``<dC', C'> + <dn', n'>``. All is float32 inside:
rows of bfloat16 are widened, and results rounded.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from moxe_plugin.nn.native.causal_squares import (
    LowerProduct,
    Sequences,
    Squares,
    multiply_into_lower,
    multiply_lower,
)
from moxe_plugin.nn.native.library import (
    SUFFIXES,
    find_function,
    int64_array,
    pointers_to,
)
from moxe_plugin.nn.native.mlstm_forms import CellGradients, NormalizerLimits
from moxe_plugin.nn.padding import EMPTY, widen
from moxe_plugin.nn.ragged_products import multiply_parts

_ROWS_AT_ONCE: Final = 32
"""Rows of memories that are decayed at a time."""


class MLSTMChunkwiseForm:
    """The cell in time and space linear in the length of a sequence.

    :param seqs: Where the sequences are.
    :param num_heads: The number of heads H.
    :param limits: The cell's constants.
    :param chunk_size: The number of positions of a chunk; the last may be shorter.
    """

    def __init__(
        self,
        seqs: Sequences,
        num_heads: int,
        limits: NormalizerLimits,
        chunk_size: int,
    ) -> None:
        self._seqs = seqs
        self._chunks = _Chunks(seqs, num_heads, chunk_size)
        self._limits = limits

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """See :class:`~moxe_plugin.nn.native.mlstm_forms.MLSTMForm`."""
        num_rows, num_heads, dim = q.shape
        chunks, limits = self._chunks, self._limits
        rows = q, k, v
        q, k, v = (widen(x) for x in rows)

        log_weights = q.new_zeros(num_heads, num_rows)
        peak, m, kept, added, total = (
            q.new_zeros(num_rows, num_heads) for _ in range(5)
        )
        decay = q.new_zeros(len(chunks.begins), num_heads)
        gate_stats = log_weights, peak, m, kept, added
        _call("stabilise", q, chunks, limits, gates, *gate_stats, decay)

        c = q.new_empty(chunks.num_memories, num_heads, dim, dim)
        n = q.new_empty(chunks.num_memories, num_heads, dim)
        _multiply_to_memories(k * added.unsqueeze(-1), v, c, chunks.earlier)
        _call("remember", q, chunks, limits, k, added, decay, c, n)

        weights = q.new_empty(chunks.squares.size)
        normalizer = torch.ones_like(total)
        multiply_into_lower(q, k, weights, chunks.squares)
        _call(
            *("weigh", q, chunks, limits, q, n),
            *(log_weights, peak, m, kept, weights, total, normalizer),
        )

        hidden = self._seqs.rows_like(q)
        multiply_lower([LowerProduct(weights, v, hidden)], chunks.squares)
        _add_from_memories(q * kept.unsqueeze(-1), c, hidden, chunks.later)
        hidden /= normalizer.unsqueeze(-1)

        saved = [
            *(*rows, gates, weights, c, n, hidden),
            *(*gate_stats, decay, total, normalizer),
        ]

        return hidden.to(rows[0].dtype), saved

    def backward(self, saved: Sequence[Tensor], grad_hidden: Tensor) -> CellGradients:
        """See :class:`~moxe_plugin.nn.native.mlstm_forms.MLSTMForm`."""
        dtype = saved[0].dtype
        q, k, v, grad_hidden = (widen(x) for x in (*saved[:3], grad_hidden))
        gates, weights, c, n, hidden, *stats = saved[3:]
        log_weights, peak, m, kept, added, decay, total, normalizer = stats
        chunks, limits = self._chunks, self._limits
        grad_numerator, grad_q, grad_k, grad_v = (
            self._seqs.rows_like(q) for _ in range(4)
        )
        grad_normalizer, grad_total, grad_m, q_dots, k_dots = (
            torch.zeros_like(m) for _ in range(5)
        )

        _call(
            *("divide_backward", q, chunks, limits, grad_hidden),
            *(hidden, normalizer, grad_numerator, grad_normalizer),
        )

        grads = torch.empty_like(weights)
        multiply_into_lower(grad_numerator, v, grads, chunks.squares)
        _call(
            *("weigh_backward", q, chunks, limits),
            *(log_weights, peak, m, total, grad_normalizer),
            *(grads, grad_total, grad_m),
        )
        multiply_lower(
            [
                LowerProduct(grads, k, grad_q),
                LowerProduct(grads, q, grad_k, transposed=True),
                LowerProduct(weights, grad_numerator, grad_v, transposed=True),
            ],
            chunks.squares,
        )

        grad_c, grad_n = torch.empty_like(c), torch.empty_like(n)
        dots = q.new_empty(-(-q.size(-1) // _ROWS_AT_ONCE), *n.shape[:2])
        grad_numerator *= kept.unsqueeze(-1)
        _multiply_to_memories(q, grad_numerator, grad_c, chunks.later)
        _call(
            *("remember_backward", q, chunks, limits, q, kept, decay),
            *(c, n, grad_total, grad_c, grad_n, dots),
        )
        _add_from_memories(grad_numerator, c.mT, grad_q, chunks.later)
        _add_from_memories(v * added.unsqueeze(-1), grad_c.mT, grad_k, chunks.earlier)
        _add_from_memories(k * added.unsqueeze(-1), grad_c, grad_v, chunks.earlier)

        _call(
            *("finish", q, chunks, limits, q, k, kept, added, n, grad_n),
            *(grad_total, grad_q, grad_k, q_dots, k_dots),
        )
        grad_gates = torch.zeros_like(gates)
        _call(
            *("stabilise_backward", q, chunks, limits, gates, log_weights, peak),
            *(q_dots, k_dots, grad_m, dots.sum(dim=0), grad_gates),
        )

        grad_q, grad_k, grad_v = (x.to(dtype) for x in (grad_q, grad_k, grad_v))

        return CellGradients(grad_q, grad_k, grad_v, grad_gates)


class _Chunks:
    # The sequences in chunks, one after the other; a memory lies between each two of a
    # sequence.

    def __init__(self, seqs: Sequences, num_heads: int, chunk_size: int) -> None:
        self.begins: list[int] = []
        self.lens: list[int] = []
        # The first chunk of each sequence that is not empty, and at last their number.
        self.firsts = [0]
        # First row and length of the chunks before and after each memory.
        self.earlier: list[tuple[int, int]] = []
        self.later: list[tuple[int, int]] = []

        for first, length in zip(*seqs, strict=True):
            chunks = [
                (first + begin, min(chunk_size, length - begin))
                for begin in range(0, length, chunk_size)
            ]
            if chunks:
                self.begins.extend(begin for begin, _ in chunks)
                self.lens.extend(n for _, n in chunks)
                self.firsts.append(len(self.begins))
                self.earlier.extend(chunks[:-1])
                self.later.extend(chunks[1:])

        self.num_memories = len(self.later)
        self.squares = Squares(Sequences(self.begins, self.lens), num_heads)


def _multiply_to_memories(
    lhs: Tensor, rhs: Tensor, out: Tensor, chunks: list[tuple[int, int]]
) -> None:
    # lhs^T rhs of each chunk and head.
    num_heads, dim = lhs.shape[1:]
    width = num_heads * dim
    numbers = array("q")

    for i, (begin, n) in enumerate(chunks):
        numbers.extend(
            (
                *(num_heads, dim, dim, n),
                *(begin * width, dim, 1, width),
                *(begin * width, dim, width, 1),
                *(i * width * dim, dim * dim, dim),
            )
        )

    multiply_parts(numbers, lhs, rhs, out)


def _add_from_memories(
    rows: Tensor, memories: Tensor, out: Tensor, chunks: list[tuple[int, int]]
) -> None:
    # Adds the rows of each chunk and head times its memory.
    num_heads, dim = rows.shape[1:]
    width = num_heads * dim
    numbers = array("q")

    for i, (begin, n) in enumerate(chunks):
        numbers.extend(
            (
                *(num_heads, n, dim, dim),
                *(begin * width, dim, width, 1),
                *(i * width * dim, dim * dim, *memories.stride()[2:]),
                *(begin * width, dim, width),
            )
        )

    multiply_parts(numbers, rows, memories, out, adds=True)


def _call(
    name: str,
    q: Tensor,
    chunks: _Chunks,
    limits: NormalizerLimits,
    *tensors: Tensor,
) -> None:
    function = find_function(
        "mlstm_chunkwise", f"moxe_mlstm_{name}_{SUFFIXES[q.dtype]}"
    )

    num_rows, num_heads, dim = q.shape
    num_seqs = len(chunks.firsts) - 1
    constants = (1 / math.sqrt(dim), EMPTY, *limits)

    # The tensors live until the call returns: the caller holds them.
    function(
        int64_array((num_seqs, num_heads, dim, num_rows, _ROWS_AT_ONCE)),
        (ctypes.c_double * len(constants))(*constants),
        ctypes.c_int(torch.get_num_threads()),
        *(
            int64_array(x)
            for x in (chunks.begins, chunks.lens, chunks.squares.offsets, chunks.firsts)
        ),
        *pointers_to(*tensors),
    )
