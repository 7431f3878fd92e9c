"""How the sLSTM block runs its cell, by what computes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moxe_plugin.nn.native.slstm_scan import RowBounds, RowScanInputs
from moxe_plugin.nn.native.slstm_scan import slstm_scan as scan_rows
from moxe_plugin.nn.padding import close_gates, valid_positions, widen
from moxe_plugin.nn.passes import widen_for_native
from moxe_plugin.nn.rows import Rows, pack, unpack
from moxe_plugin.nn.slstm_cell import SLSTMMemory, SLSTMScanInputs, slstm_sequence


class GateRows(NamedTuple):
    """What the inputs contribute to the gates, and where its rows are in a batch."""

    gates: Sequence[Tensor]
    """The pre-activations of i and f, and those of z and o. *Shape:* ``(C,H*2D)`` each.
    """

    grid_shape: tuple[int, ...]
    """``([E,]N,S)``."""

    seq_lens: Tensor | None
    """Where right padding begins; ``None`` without padding. *Shape:* ``([E,]N)``."""

    rows: Rows | None
    """The rows, if they leave out padding; ``None`` if they are the whole batch."""


class SLSTMCell(NamedTuple):
    """The cells of a block: its own parameters, and what computes them."""

    gate_bias: Tensor
    """*Shape:* ``([E,]H,4,D)``, gates i, f, z, o."""

    recurrent_weight: Tensor
    """*Shape:* ``([E,]H,D,4,D)``, input first."""

    backend: Literal["torch", "native", "triton"]
    """What :func:`~moxe_plugin.nn.backend.resolve_backend` chose."""

    def apply(
        self, inputs: GateRows, memory: SLSTMMemory
    ) -> tuple[Tensor, SLSTMMemory]:
        """Run the cells over a batch.

        :param inputs: The gates.
        :param memory: The memory before the first position. *Shape:* ``([E,]N,H,D)``
            each.

        :returns: The outputs ``(C,H*D)``, and the memory after each row's last valid
            position.
        """
        if self.backend == "native":
            return self._scan_rows(inputs, memory)

        # (C,H*2D) -> ([E,]N,S,H*2D) -> ([E,]H,N,S,2D)
        gates = [
            torch.unflatten(
                x.view(*inputs.grid_shape, x.size(-1))
                if inputs.rows is None
                else unpack(x, inputs.rows),
                -1,
                (self.gate_bias.size(-3), -1),
            ).movedim(-2, -4)
            for x in inputs.gates
        ]

        run = self._step if self.backend == "torch" else self._scan_grid
        hidden, memory = run(gates, inputs.seq_lens, memory)

        if inputs.rows is None:
            return hidden.flatten(0, -2), memory

        return pack(hidden, inputs.rows), memory

    def _scan_rows(
        self, inputs: GateRows, memory: SLSTMMemory
    ) -> tuple[Tensor, SLSTMMemory]:
        # bfloat16 if both are, and C++ reads it.
        dtype = torch.promote_types(
            *(
                widen_for_native(x).dtype
                for x in (inputs.gates[0], self.recurrent_weight)
            )
        )
        wide = torch.promote_types(dtype, torch.float32)
        leaders = [
            self.gate_bias.to(wide),
            self.recurrent_weight.to(dtype),
            *(x.to(wide) for x in memory),
        ]

        is_single = self.gate_bias.ndim == 3
        if is_single:
            leaders = [x.unsqueeze(0) for x in leaders]

        results = scan_rows(
            RowScanInputs(*(x.to(dtype) for x in inputs.gates), *leaders),
            find_bounds(*inputs[1:], len(leaders[0])),
        )
        outputs, *last = results
        if is_single:
            last = [x.squeeze(0) for x in last]

        return outputs, SLSTMMemory(*last)

    def _scan_grid(
        self, gates: Sequence[Tensor], seq_lens: Tensor | None, memory: SLSTMMemory
    ) -> tuple[Tensor, SLSTMMemory]:
        # Imports Triton, which not every machine has.
        from moxe_plugin.nn.triton.slstm_scan import runs_on_chip, slstm_scan

        weight = self.recurrent_weight
        inputs = [*gates, self.gate_bias, weight]
        if not runs_on_chip(weight):
            inputs = [widen(x) for x in inputs]
        inputs += memory

        is_single = weight.ndim == 4
        if is_single:
            inputs = [x.unsqueeze(0) for x in inputs]
            seq_lens = None if seq_lens is None else seq_lens.unsqueeze(0)

        results = slstm_scan(SLSTMScanInputs(*inputs), seq_lens)
        outputs, *last = (x.squeeze(0) for x in results) if is_single else results

        return outputs.flatten(-2), SLSTMMemory(*last)

    def _step(
        self, halves: Sequence[Tensor], seq_lens: Tensor | None, memory: SLSTMMemory
    ) -> tuple[Tensor, SLSTMMemory]:
        gates = self._gate_inputs(halves, seq_lens)
        weight = self.recurrent_weight.flatten(0, -4).to(gates.dtype)
        # time first, batch last: (S,E*H,D,N)
        outputs, c, log_n = slstm_sequence(
            gates, weight, SLSTMMemory(*(_batch_last(x) for x in memory))
        )

        hidden = self._batch_first(outputs).movedim(0, -3).flatten(-2)

        if hidden.size(-2) == 0:
            y = memory.y
        elif seq_lens is None:
            y = self._batch_first(outputs[-1])
        else:
            y = _last_output(hidden, memory.y, seq_lens)

        return hidden, SLSTMMemory(self._batch_first(c), self._batch_first(log_n), y)

    def _gate_inputs(self, halves: Sequence[Tensor], seq_lens: Tensor | None) -> Tensor:
        head_dim = self.gate_bias.size(-1)

        # ([E,]H,N,S,gate*out) -> (S,[E,]H,gate,out,N)
        halves = [
            torch.unflatten(x, -1, (-1, head_dim)).movedim(-3, 0).movedim(-3, -1)
            for x in halves
        ]
        # (S,[E,]H,4,D,N)
        gates = widen(torch.cat(halves, dim=-3))
        gates = gates + widen(self.gate_bias).unsqueeze(-1)

        if seq_lens is not None:
            i, f, z, o = gates.unbind(-3)
            # ([E,]N,S) -> (S,[E,]1,1,N)
            valid = valid_positions(seq_lens, gates.size(0)).movedim(-1, 0)
            i, f = close_gates(i, f, valid.unsqueeze(-2).unsqueeze(-2))
            gates = torch.stack([i, f, z, o], dim=-3)

        return gates.flatten(1, -4)

    def _batch_first(self, x: Tensor) -> Tensor:
        # (…,E*H,D,N) -> (…,[E,]N,H,D)
        heads = self.gate_bias.shape[:-2]

        return torch.unflatten(x, -3, heads).movedim(-1, -3)


def find_bounds(
    grid_shape: Sequence[int],
    seq_lens: Tensor | None,
    rows: Rows | None,
    num_experts: int,
) -> RowBounds:
    """Find where sequences stand.

    :param grid_shape: As in :class:`GateRows`.
    :param seq_lens: As there.
    :param rows: As there.
    :param num_experts: The number of stacked blocks, 1 for a single one.

    :returns: The bounds.
    """
    *batch, length = grid_shape
    num_seqs = math.prod(batch) // num_experts

    if rows is not None:
        begins = [0, *accumulate(rows.seq_lens)][:-1]

        return RowBounds(
            rows.counts,
            # Of no sequence, they would be floats.
            torch.tensor(begins, dtype=torch.int64).view(num_experts, num_seqs),
            torch.tensor(rows.seq_lens, dtype=torch.int64).view(num_experts, num_seqs),
            padded_len=0,
        )

    begins_by_seq = torch.arange(num_experts * num_seqs) * length
    if seq_lens is None:
        lens = torch.full_like(begins_by_seq, length)
    else:
        lens = seq_lens.long().clamp(0, length)

    return RowBounds(
        [num_seqs * length] * num_experts,
        begins_by_seq.view(num_experts, num_seqs),
        lens.contiguous().view(num_experts, num_seqs),
        padded_len=length,
    )


def _last_output(hidden: Tensor, y: Tensor, seq_lens: Tensor) -> Tensor:
    # Position t of `hidden` is position t+1 here.
    outputs = torch.cat([y.flatten(-2).unsqueeze(-2), hidden], dim=-2)
    index = seq_lens[..., None, None].expand(*seq_lens.shape, 1, hidden.size(-1))

    last = outputs.gather(-2, index).squeeze(-2)

    return torch.unflatten(last, -1, y.shape[-2:])


def _batch_last(x: Tensor) -> Tensor:
    # ([E,]N,H,D) -> (E*H,D,N)
    return x.movedim(-3, -1).flatten(0, -3)
