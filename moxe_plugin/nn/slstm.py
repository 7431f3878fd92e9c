"""The sLSTM block of xLSTM (arXiv 2405.04517, figure 10), one or a stack of E."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from moxe_plugin.nn.backend import product_dtype, resolve_backend, trains_on_rows
from moxe_plugin.nn.grouped import grouped_head_products
from moxe_plugin.nn.layers import NORM_EPS
from moxe_plugin.nn.native.block_params import count_blocks, find_block_rows
from moxe_plugin.nn.native.library import NativeSource, why_not_loaded
from moxe_plugin.nn.native.slstm_block import slstm_block_rows
from moxe_plugin.nn.products import runs_native
from moxe_plugin.nn.ragged import RaggedRows, full_rows
from moxe_plugin.nn.rows import Rows, find_rows, last_rows, pack, unpack
from moxe_plugin.nn.slstm_cell import SLSTMMemory
from moxe_plugin.nn.slstm_parameters import SLSTMParameters, SLSTMState
from moxe_plugin.nn.slstm_recurrence import GateRows, SLSTMCell, find_bounds
from moxe_plugin.nn.stacked import equal_counts

_SOURCES: Final[Sequence[NativeSource]] = (
    *("scale_norm", "causal_conv", "slstm_scan", "gating", "slstm_block"),
)


class SLSTMBlock(SLSTMParameters):
    """Pre-norm, sLSTM cell, residual; pre-norm, gated feed-forward, residual.

    ::

        x' = norm(x);  u = silu(conv(x'))
        i, f, z, o = head_wise(u), head_wise(u), head_wise(x'), head_wise(x')
        x = x + norm_per_head(cell(i, f, z, o))
        y = x + ffn(ffn_norm(x))

    Parameters are those of :class:`SLSTMParameters`.
    """

    def forward(
        self,
        seqs: Tensor,
        seq_lens: Tensor | None = None,
        state: SLSTMState | None = None,
        *,
        return_state: bool = True,
        reuse_state: bool = False,
    ) -> tuple[Tensor, SLSTMState | None]:
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

        if not keeps_state and (self.num_experts is None or seq_lens is None):
            out = self._apply_natively(seqs, seq_lens, None)
            if out is not None:
                return out, None

        if state is None:
            state = self.initial_state(seqs.size(-3), seqs.device)

        if self.num_experts is not None and seq_lens is not None:
            rows = find_rows(seq_lens, seqs.size(-2))
            flat, normed, memory = self._apply_to_rows(
                *(pack(seqs, rows), rows, seq_lens, state)
            )

            seqs = unpack(flat, rows)
            window = last_rows(normed, rows, state.conv) if return_state else None
        else:
            normed = self.norm(seqs)
            convolved, window = self.conv(normed, state.conv, seq_lens, self.backend)
            gates = self._project_gates(convolved, normed, None)

            hidden, memory = self._cell(seqs).apply(
                GateRows(gates, seqs.shape[:-1], seq_lens, None),
                SLSTMMemory(*state[1:]),
            )

            seqs = self._feed_forward(seqs, hidden.view(seqs.shape), None)

        if not return_state:
            return seqs, None

        assert window is not None

        return seqs, SLSTMState(window, *memory)

    def trains_on_rows(self, seqs: Tensor) -> bool:
        """Tell whether :meth:`apply_to_rows` can be asked for.

        :param seqs: What the block, or what sends it rows, reads. *Shape:* ``(N,S,M)``.

        :returns: See :func:`~moxe_plugin.nn.backend.trains_on_rows`.
        """
        if not trains_on_rows(self.backend, seqs):
            return False

        from moxe_plugin.nn.triton.slstm_block import supports

        return supports(self.head_dim, product_dtype(seqs), self.conv.kernel_size)

    def apply_to_rows(self, flat: Tensor, rows: RaggedRows) -> Tensor:
        """Apply the block to segments, each from an empty memory, in Triton kernels.

        :param flat: *Shape:* ``(C,M)``.
        :param rows: Where rows stand.

        :returns: The outputs, as ``flat``.
        """
        # Imports Triton, which not every machine has.
        from moxe_plugin.nn.triton.slstm_block import slstm_block_rows

        weights = self._list_weights()

        return slstm_block_rows(flat, weights, rows, NORM_EPS, product_dtype(flat))

    def apply_to_host_rows(self, flat: Tensor, rows: Rows) -> Tensor:
        """Apply the experts to sub-sequences, each from an empty memory, on a CPU.

        :param flat: *Shape:* ``(C,M)``.
        :param rows: The sub-sequences.

        :returns: The outputs, as ``flat``.
        """
        out = self._apply_natively(flat, None, rows)
        if out is not None:
            return out

        num_experts, num_seqs, _ = rows.grid_shape
        seq_lens = torch.tensor(rows.seq_lens, device=flat.device).view(
            num_experts, num_seqs
        )
        state = self.initial_state(num_seqs, flat.device)

        return self._apply_to_rows(flat, rows, seq_lens, state)[0]

    def _apply_natively(
        self, seqs: Tensor, seq_lens: Tensor | None, rows: Rows | None
    ) -> Tensor | None:
        # The whole block as one function in C++, from an empty memory; hooks of its
        # modules do not run. `None` if it is not C++.
        weights = self._list_weights()

        if (
            self.backend not in ("auto", "native")
            or not runs_native(seqs, *weights)
            or any(why_not_loaded(source) for source in _SOURCES)
        ):
            return None

        grid_shape: Sequence[int] = seqs.shape[:-1]
        if rows is not None:
            grid_shape = rows.grid_shape
        num_blocks = count_blocks(weights)

        return slstm_block_rows(
            *(seqs.reshape(-1, self.model_dim), weights),
            find_block_rows(seqs.shape, num_blocks, rows),
            find_bounds(grid_shape, seq_lens, rows, num_blocks),
            NORM_EPS,
        ).view(seqs.shape)

    def _apply_to_rows(
        self, flat: Tensor, rows: Rows, seq_lens: Tensor, state: SLSTMState
    ) -> tuple[Tensor, Tensor, SLSTMMemory]:
        # The outputs, what the convolution reads, and the memory.
        normed = self.norm(flat, rows.counts)
        convolved = self.conv.convolve_rows(normed, rows, state.conv, self.backend)
        gates = self._project_gates(convolved, normed, rows.counts)

        hidden, memory = self._cell(flat).apply(
            GateRows(gates, rows.grid_shape, seq_lens, rows), SLSTMMemory(*state[1:])
        )

        return self._feed_forward(flat, hidden, rows.counts), normed, memory

    def _cell(self, seqs: Tensor) -> SLSTMCell:
        backend = resolve_backend(self.backend, seqs)

        return SLSTMCell(self.gate_bias, self.recurrent_weight, backend)

    def _feed_forward(
        self, seqs: Tensor, hidden: Tensor, counts: Sequence[int] | None
    ) -> Tensor:
        seqs = seqs + self.out_norm(hidden.to(seqs.dtype), counts)

        output: Tensor = seqs + self.ffn(self.ffn_norm(seqs, counts), counts)

        return output

    def _project_gates(
        self, convolved: Tensor, normed: Tensor, counts: Sequence[int] | None
    ) -> list[Tensor]:
        # i and f see the convolution, z and o do not: (…,M) -> (…,H*2*D) -> (C,H*2*D)
        # ([E,]H,D,4,D) -> (E,H,D,2,2*D)
        pairs = 2, 2 * self.head_dim
        weight = self.gate_proj.view(-1, *self.gate_proj.shape[-4:-2], *pairs)
        rows = [x.flatten(0, -2) for x in (convolved, normed)]

        if counts is None:
            counts = equal_counts(rows[0], weight)

        return grouped_head_products(rows, weight, counts)
