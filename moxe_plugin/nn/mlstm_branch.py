"""What an mLSTM block computes before and after its cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moxe_plugin.nn.layers import NORM_EPS
from moxe_plugin.nn.mlstm_hidden import mlstm_hidden_rows
from moxe_plugin.nn.mlstm_parameters import MLSTMParameters
from moxe_plugin.nn.mlstm_recurrence import MLSTMCellInputs, MLSTMRecurrence
from moxe_plugin.nn.native.causal_squares import Sequences
from moxe_plugin.nn.native.gating import MLSTMOutput, gate_mlstm_output
from moxe_plugin.nn.native.library import why_not_loaded
from moxe_plugin.nn.native.mlstm_projections import MLSTMProjections, fits
from moxe_plugin.nn.padding import widen
from moxe_plugin.nn.passes import has_native_dtype, passes_natively
from moxe_plugin.nn.products import runs_native
from moxe_plugin.nn.stacked import (
    equal_counts,
    per_channel,
    project,
    project_head_wise,
    project_in_halves,
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

    def hidden_natively(
        self,
        conv_input: Tensor,
        convolved: Tensor,
        counts: Sequence[int] | None,
        seqs: Callable[[], Sequences],
    ) -> Tensor | None:
        """Project to what the cell reads and run it, from an empty memory, in C++.

        :param conv_input: As for :meth:`cell_inputs`.
        :param convolved: As there.
        :param counts: As there.
        :param seqs: Finds the sequences.

        :returns: The outputs of the cell, ``(…,I)``; ``None`` if it is not C++.
        """
        inputs = (
            *(conv_input, convolved, self.q_proj, self.k_proj, self.v_proj),
            *(self.input_gate_weight, self.forget_gate_weight),
            *(self.input_gate_bias, self.forget_gate_bias),
        )

        if not runs_native(*inputs):
            return None

        # One block is that of one expert.
        projections = MLSTMProjections(
            *(
                x.unsqueeze(0) if self.num_experts is None else x
                for x in (*inputs[2:5], *self._gate_parameters())
            )
        )
        if not fits(projections) or why_not_loaded("mlstm_projections"):
            return None

        form = self.recurrence.find_form(inputs, seqs)
        if form is None:
            return None

        # ([E,]N,S,I) -> (C,I)
        flat_input, flat = (x.reshape(-1, self.inner_dim) for x in inputs[:2])
        if counts is None:
            counts = equal_counts(flat, projections.q)

        hidden = mlstm_hidden_rows(flat_input, flat, projections, counts, form)

        return hidden.view(convolved.shape)

    @property
    def recurrence(self) -> MLSTMRecurrence:
        """The cell."""
        return MLSTMRecurrence(self.num_heads, self.backend)

    def _gates(
        self, q: Tensor, k: Tensor, v: Tensor, counts: Sequence[int] | None
    ) -> Tensor:
        weight, bias = self._gate_parameters()

        # A sum of three products spares the concatenation of q, k and v.
        preacts = [
            project(x, w, counts)
            for x, w in zip((q, k, v), weight.chunk(3, dim=-2), strict=True)
        ]
        summed = widen(preacts[0] + preacts[1] + preacts[2])

        # ([E,]N,S,2H), or rows
        return summed + per_channel(bias, summed, counts)

    def _gate_parameters(self) -> tuple[Tensor, Tensor]:
        # ([E,]3*I,2*H) and ([E,]2*H)
        return (
            torch.cat([self.input_gate_weight, self.forget_gate_weight], dim=-1),
            torch.cat([self.input_gate_bias, self.forget_gate_bias], dim=-1),
        )
