"""The mLSTM cell over whole sequences on a CPU: its parallel form, without padding.

The same function as :func:`~moxe_plugin.nn.mlstm_cell.mlstm_parallel`, whose docstring
has the equations, with an empty memory before and none wanted after. Sequences of any
lengths stand one after the other in rows, heads side by side in a row, as the products
around the cell make and read them. What lies above the diagonal of a square is not
computed, but for what is next to it. Rows may be bfloat16: squares and gates are
float32 then, but for the rounding of squares that are multiplied.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

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
from moxe_plugin.nn.padding import EMPTY


class MLSTMParallelForm:
    """The cell in time and space quadratic in the length of a sequence.

    :param seqs: Where the sequences are.
    :param num_heads: The number of heads H.
    :param limits: The cell's constants.
    """

    def __init__(
        self, seqs: Sequences, num_heads: int, limits: NormalizerLimits
    ) -> None:
        self._seqs = seqs
        self._squares = Squares(seqs, num_heads)
        self._limits = limits

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """See :class:`~moxe_plugin.nn.native.mlstm_forms.MLSTMForm`."""
        num_rows, num_heads, _ = q.shape

        weights = gates.new_empty(self._squares.size)
        multiply_into_lower(q, k, weights, self._squares)

        # a, its maximum, m, the sum of weights, the normaliser
        stats = [gates.new_empty(num_rows, num_heads) for _ in range(5)]
        self._call("weigh", q.size(-1), gates, weights, *stats)

        hidden = self._seqs.rows_like(q)
        multiply_lower([LowerProduct(weights, v, hidden)], self._squares)

        return hidden, [q, k, v, gates, weights, *stats]

    def backward(self, saved: Sequence[Tensor], grad_hidden: Tensor) -> CellGradients:
        """See :class:`~moxe_plugin.nn.native.mlstm_forms.MLSTMForm`."""
        q, k, v, gates, weights, *stats = saved

        grads = torch.empty_like(weights)
        multiply_into_lower(grad_hidden, v, grads, self._squares)

        grad_q, grad_k, grad_v, grad_gates = (
            self._seqs.rows_like(x) for x in (q, k, v, gates)
        )
        self._call(
            "weigh_backward", q.size(-1), gates, weights, *stats, grads, grad_gates
        )

        multiply_lower(
            [
                LowerProduct(grads, k, grad_q),
                LowerProduct(grads, q, grad_k, transposed=True),
                LowerProduct(weights, grad_hidden, grad_v, transposed=True),
            ],
            self._squares,
        )

        return CellGradients(grad_q, grad_k, grad_v, grad_gates)

    def _call(self, name: str, head_dim: int, gates: Tensor, *others: Tensor) -> None:
        function = find_function(
            "mlstm_parallel", f"moxe_mlstm_{name}_{SUFFIXES[gates.dtype]}"
        )

        squares = self._squares
        lists = squares.begins, squares.lens, squares.offsets
        constants = (1 / math.sqrt(head_dim), EMPTY, *self._limits)

        # The tensors live until the call returns: the caller holds them.
        function(
            int64_array((len(squares.lens), squares.num_heads)),
            (ctypes.c_double * len(constants))(*constants),
            ctypes.c_int(torch.get_num_threads()),
            *(int64_array(x) for x in lists),
            *pointers_to(gates, *others),
        )
