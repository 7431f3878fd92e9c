"""What an mLSTM block computes before and after its cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from moxe_plugin.nn.layers import NORM_EPS
from moxe_plugin.nn.mlstm_parameters import MLSTMParameters
from moxe_plugin.nn.mlstm_recurrence import MLSTMCellInputs, MLSTMRecurrence
from moxe_plugin.nn.native.block_params import count_blocks, find_block_rows
from moxe_plugin.nn.native.causal_squares import Sequences
from moxe_plugin.nn.native.gating import MLSTMOutput, gate_mlstm_output
from moxe_plugin.nn.native.library import NativeSource, why_not_loaded
from moxe_plugin.nn.native.mlstm_block import mlstm_block_rows
from moxe_plugin.nn.native.mlstm_projections import fits
from moxe_plugin.nn.padding import widen
from moxe_plugin.nn.passes import has_native_dtype, passes_natively
from moxe_plugin.nn.products import runs_native
from moxe_plugin.nn.rows import Rows
from moxe_plugin.nn.stacked import (
    equal_counts,
    per_channel,
    project,
    project_head_wise,
    project_in_halves,
)

_SOURCES: Final[Sequence[NativeSource]] = (
    *("scale_norm", "causal_conv", "mlstm_projections", "gating", "mlstm_block"),
)


class MLSTMBranch(MLSTMParameters):
    """The branch beside the residual of :class:`~moxe_plugin.nn.mlstm.MLSTMBlock`.

    Its convolution and its cell are the block's: they depend on what it remembers.
    """

    def project_up(
        self, seqs: Tensor, counts: Sequence[int] | None
    ) -> tuple[Tensor, Tensor]:
        """Normalise, and project to what the convolution and the gate read.

        :param seqs: *Shape:* ``([E,]N,S,M)``, or rows ``(C,M)``.
        :param counts: The rows of each expert, if ``seqs`` are rows.

        :returns: *Shape:* ``(…,I)`` each.
        """
        normed = self.norm(seqs, counts)

        return project_in_halves(normed, self.up_proj, counts)

    def project_down(
        self,
        hidden: Tensor,
        convolved: Tensor,
        gate: Tensor,
        counts: Sequence[int] | None,
    ) -> Tensor:
        """Let the gate pass the cell's outputs, and project them to the block's width.

        :param hidden: The outputs of the cell. *Shape:* ``(…,I)``.
        :param convolved: What queries and keys were made of. *Shape:* ``(…,I)``.
        :param gate: What :meth:`project_up` made for it. *Shape:* ``(…,I)``.
        :param counts: As there.

        :returns: *Shape:* ``(…,M)``.
        """
        inputs = MLSTMOutput(hidden, self.out_norm.weight, convolved, self.skip, gate)

        if self._gates_natively(inputs):
            # ([E,]N,S,I) -> (C,I), of one expert or E of them
            flat = MLSTMOutput(*(x.reshape(-1, self.inner_dim) for x in inputs))
            gated = gate_mlstm_output(
                flat,
                equal_counts(flat.hidden, flat.weight) if counts is None else counts,
                self.num_heads,
                NORM_EPS,
            )

            return project(gated.view(hidden.shape), self.down_proj, counts)

        hidden = self.out_norm(hidden, counts)
        hidden = hidden + per_channel(self.skip, convolved, counts) * convolved

        return project(hidden * F.silu(gate), self.down_proj, counts)

    def _gates_natively(self, inputs: MLSTMOutput) -> bool:
        return (
            self.backend in ("auto", "native")
            and has_native_dtype(inputs.hidden)
            and passes_natively("gating", *inputs)
        )

    def cell_inputs(
        self, conv_input: Tensor, convolved: Tensor, counts: Sequence[int] | None
    ) -> MLSTMCellInputs:
        """Project to what the cell reads.

        :param conv_input: What :meth:`project_up` made. *Shape:* ``(…,I)``.
        :param convolved: What the convolution made of it. *Shape:* ``(…,I)``.
        :param counts: As there.

        :returns: The cell's inputs.
        """
        q = project_head_wise(convolved, self.q_proj, counts)
        k = project_head_wise(convolved, self.k_proj, counts)
        v = project_head_wise(conv_input, self.v_proj, counts)

        return MLSTMCellInputs(q, k, v, self._gates(q, k, v, counts))

    def apply_natively(
        self, seqs: Tensor, rows: Rows | None, find_seqs: Callable[[], Sequences]
    ) -> Tensor | None:
        """Apply the whole block as one function in C++, from an empty memory.

        Hooks of its modules do not run.

        :param seqs: *Shape:* ``([E,]N,S,M)``, or rows ``(C,M)``.
        :param rows: The sub-sequences, if ``seqs`` are rows.
        :param find_seqs: Finds the sequences of the cell.

        :returns: The outputs, as ``seqs``; ``None`` if it is not C++.
        """
        weights = self._list_weights()

        if (
            self.backend not in ("auto", "native")
            or not runs_native(seqs, *weights)
            or not fits(weights.q_proj.size(-1), self.num_heads)
            or any(why_not_loaded(source) for source in _SOURCES)
        ):
            return None

        form = self.recurrence.choose_form(self.inner_dim // self.num_heads, find_seqs)
        if form is None:
            return None

        return mlstm_block_rows(
            *(seqs.reshape(-1, self.model_dim), weights),
            find_block_rows(seqs.shape, count_blocks(weights), rows),
            form,
            num_heads=self.num_heads,
            eps=NORM_EPS,
        ).view(seqs.shape)

    @property
    def recurrence(self) -> MLSTMRecurrence:
        """The cell."""
        return MLSTMRecurrence(self.num_heads, self.backend)

    def _gates(
        self, q: Tensor, k: Tensor, v: Tensor, counts: Sequence[int] | None
    ) -> Tensor:
        # ([E,]3*I,2*H) and ([E,]2*H)
        weight = torch.cat([self.input_gate_weight, self.forget_gate_weight], dim=-1)
        bias = torch.cat([self.input_gate_bias, self.forget_gate_bias], dim=-1)

        # A sum of three products spares the concatenation of q, k and v.
        preacts = [
            project(x, w, counts)
            for x, w in zip((q, k, v), weight.chunk(3, dim=-2), strict=True)
        ]
        summed = widen(preacts[0] + preacts[1] + preacts[2])

        # ([E,]N,S,2H), or rows
        return summed + per_channel(bias, summed, counts)
