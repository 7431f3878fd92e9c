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
from moxe_plugin.nn.native.products import rounding_now
from moxe_plugin.nn.padding import EMPTY
from moxe_plugin.nn.products import runs_native


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
        num_rows, num_heads, head_dim = q.shape

        weights = gates.new_empty(self._squares.size)
        # a, its maximum, m, the sum of weights, the normaliser
        stats = gates.new_empty(5, num_rows, num_heads).unbind()
        saved = [q, k, v, gates, weights, *stats]

        if runs_native(q, k, v, weights, mixes=True):
            hidden = torch.empty_like(q)
            self._call_whole("forward", *saved, hidden)

            return hidden, saved

        multiply_into_lower(q, k, weights, self._squares)
        self._call("weigh", head_dim, gates, weights, *stats)
        hidden = self._seqs.rows_like(q)
        multiply_lower([LowerProduct(weights, v, hidden)], self._squares)

        return hidden, saved

    def backward(self, saved: Sequence[Tensor], grad_hidden: Tensor) -> CellGradients:
        """See :class:`~moxe_plugin.nn.native.mlstm_forms.MLSTMForm`."""
        q, k, v, gates, weights, *stats = saved

        if runs_native(q, k, v, weights, grad_hidden, mixes=True):
            whole = CellGradients(*(torch.empty_like(x) for x in (q, k, v, gates)))
            self._call_whole("backward", *saved, grad_hidden, *whole)

            return whole

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

    def _call_whole(self, direction: str, q: Tensor, *others: Tensor) -> None:
        # The products as well, where they are C++.
        num_rows, num_heads, head_dim = q.shape
        numbers = (
            *(q.element_size(), rounding_now(), torch.get_num_threads()),
            *(len(self._squares.lens), num_rows, num_heads, head_dim),
        )

        # The tensors live until the call returns: the caller holds them.
        lacks_memory = find_function(
            "mlstm_parallel", f"moxe_mlstm_parallel_{direction}"
        )(
            ctypes.cast(find_function("products", "moxe_multiply"), ctypes.c_void_p),
            int64_array(numbers),
            int64_array(self._squares.begins),
            int64_array(self._squares.lens),
            self._constants(head_dim),
            *pointers_to(q, *others),
        )

        if lacks_memory:
            raise MemoryError("There is no memory for squares of weights.")

    def _call(self, name: str, head_dim: int, gates: Tensor, *others: Tensor) -> None:
        function = find_function(
            "mlstm_parallel", f"moxe_mlstm_{name}_{SUFFIXES[gates.dtype]}"
        )
        squares = self._squares
        lists = squares.begins, squares.lens, squares.offsets

        # As there.
        function(
            int64_array((len(squares.lens), squares.num_heads)),
            self._constants(head_dim),
            ctypes.c_int(torch.get_num_threads()),
            *(int64_array(x) for x in lists),
            *pointers_to(gates, *others),
        )

    def _constants(self, head_dim: int) -> ctypes.Array[ctypes.c_double]:
        constants = (1 / math.sqrt(head_dim), EMPTY, *self._limits)

        return (ctypes.c_double * len(constants))(*constants)
