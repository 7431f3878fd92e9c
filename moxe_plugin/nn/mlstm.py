"""The mLSTM block of xLSTM (arXiv 2405.04517, figure 11), one or a stack of E."""

from __future__ import annotations

from torch import Tensor

from moxe_plugin.nn.backend import product_dtype, trains_on_rows
from moxe_plugin.nn.layers import NORM_EPS
from moxe_plugin.nn.mlstm_branch import MLSTMBranch
from moxe_plugin.nn.mlstm_cell import MLSTMMemory
from moxe_plugin.nn.mlstm_recurrence import (
    MLSTMState,
    follow_each_other,
    list_sequences,
)
from moxe_plugin.nn.ragged import RaggedRows, full_rows
from moxe_plugin.nn.rows import Rows, find_rows, last_rows, pack, unpack


class MLSTMBlock(MLSTMBranch):
    """Pre-norm, up-projection, mLSTM cell beside a gate, down-projection, residual.

    ::

        a, z = split(norm(x) W_up)
        u = silu(conv(a));  q, k = head_wise(u);  v = head_wise(a)
        i, f = [q, k, v] W_i + b_i, [q, k, v] W_f + b_f
        h = norm_per_head(cell(q, k, v, i, f))
        y = x + ((h + skip * u) * silu(z)) W_down

    Parameters are those of
    :class:`~moxe_plugin.nn.mlstm_parameters.MLSTMParameters`.
    """

    def forward(
        self,
        seqs: Tensor,
        seq_lens: Tensor | None = None,
        state: MLSTMState | None = None,
        *,
        return_state: bool = True,
        reuse_state: bool = False,
    ) -> tuple[Tensor, MLSTMState | None]:
        """Apply the block to sequences.

        :param seqs: *Shape:* ``([E,]N,S,M)``.
        :param seq_lens: Where right padding begins, from 0; ``None`` without padding.
            Outputs at padding are finite and meaningless. *Shape:* ``([E,]N)``.
        :param state: The state before the first position; ``None`` if empty.
        :param return_state: Whether to return a state.
        :param reuse_state: Whether the tensors of ``state`` may become those of the
            state that is returned.

        :returns: The outputs, as ``seqs``, and the state after each row's last valid
            position (``state`` itself for a row of length 0), or ``None``.
        """
        keeps_state = state is not None or return_state

        if self._is_step(seqs, seq_lens) and keeps_state:
            return self._step(
                seqs, state, reuse=reuse_state, returns_state=return_state
            )

        if self.num_experts is None and not keeps_state and self.trains_on_rows(seqs):
            flat = self.apply_to_rows(
                seqs.flatten(0, 1), full_rows(*seqs.shape[:2], seqs.device)
            )

            return flat.view_as(seqs), None

        memory = None if state is None else MLSTMMemory(*state[1:])
        window = None if state is None else state.conv

        if not keeps_state and (self.num_experts is None or seq_lens is None):
            out = self.apply_natively(
                seqs, None, list_sequences(seqs.shape[:-1], seq_lens)
            )
            if out is not None:
                return out, None

        if self.num_experts is not None and seq_lens is not None:
            rows = find_rows(seq_lens, seqs.size(-2))

            flat, window, memory = self._apply_to_rows(
                *(pack(seqs, rows), rows, window, memory), return_state=return_state
            )

            return unpack(flat, rows), _as_state(window, memory)

        conv_input, gate = self.project_up(seqs, None)

        if window is None:
            window_shape = *seqs.shape[:-2], self.conv.kernel_size - 1, self.inner_dim
            window = seqs.new_zeros(window_shape)

        convolved, window = self.conv(conv_input, window, seq_lens, self.backend)

        hidden, memory = self.recurrence.apply(
            self.cell_inputs(conv_input, convolved, None),
            *(seq_lens, memory),
            return_memory=return_state,
        )
        out = seqs + self.project_down(hidden, convolved, gate, None)

        return out, _as_state(window, memory)

    def trains_on_rows(self, seqs: Tensor) -> bool:
        """Tell whether :meth:`apply_to_rows` can be asked for.

        :param seqs: What the block, or what sends it rows, reads. *Shape:* ``(N,S,M)``.

        :returns: See :func:`~moxe_plugin.nn.backend.trains_on_rows`.
        """
        if not trains_on_rows(self.backend, seqs):
            return False

        from moxe_plugin.nn.triton.mlstm_block import supports

        return supports(
            self.inner_dim // self.num_heads,
            self.q_proj.size(-1),
            self.conv.kernel_size,
        )

    def apply_to_rows(self, flat: Tensor, rows: RaggedRows) -> Tensor:
        """Apply the block to segments, each from an empty memory, in Triton kernels.

        :param flat: *Shape:* ``(C,M)``.
        :param rows: Where rows stand.

        :returns: The outputs, as ``flat``.
        """
        # Imports Triton, which not every machine has.
        from moxe_plugin.nn.triton.mlstm_block import mlstm_block_rows

        weights = self._list_weights()

        return mlstm_block_rows(
            *(flat, weights, rows, self.num_heads, NORM_EPS, product_dtype(flat))
        )

    def apply_to_host_rows(self, flat: Tensor, rows: Rows) -> Tensor:
        """Apply the experts to sub-sequences, each from an empty memory, on a CPU.

        :param flat: *Shape:* ``(C,M)``.
        :param rows: The sub-sequences.

        :returns: The outputs, as ``flat``.
        """
        return self._apply_to_rows(flat, rows, None, None, return_state=False)[0]

    def _apply_to_rows(
        self,
        flat: Tensor,
        rows: Rows,
        window: Tensor | None,
        memory: MLSTMMemory | None,
        *,
        return_state: bool,
    ) -> tuple[Tensor, Tensor | None, MLSTMMemory | None]:
        counts = rows.counts

        if memory is None and not return_state:
            out = self.apply_natively(flat, rows, follow_each_other(rows.seq_lens))
            if out is not None:
                return out, None, None

        conv_input, gate = self.project_up(flat, counts)
        convolved = self.conv.convolve_rows(conv_input, rows, window, self.backend)

        if return_state and memory is None:
            initial = self.initial_state(rows.grid_shape[1], flat.device)
            window, memory = initial.conv, MLSTMMemory(*initial[1:])

        hidden, memory = self.recurrence.apply_to_rows(
            self.cell_inputs(conv_input, convolved, counts),
            *(rows, memory),
            return_memory=return_state,
        )

        if return_state:
            assert window is not None
            window = last_rows(conv_input, rows, window)

        return (
            flat + self.project_down(hidden, convolved, gate, counts),
            window,
            memory,
        )


def _as_state(window: Tensor | None, memory: MLSTMMemory | None) -> MLSTMState | None:
    return None if window is None or memory is None else MLSTMState(window, *memory)
