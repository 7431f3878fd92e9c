"""Sparse experts: send tokens to experts, weigh and sum the outputs. MoxE eq. (9)."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import Module
from typing_extensions import override

from moxe_plugin.nn.backend import MAX_STEP_SEQS
from moxe_plugin.nn.expert_layouts import LAYOUTS, ExpertStateKind
from moxe_plugin.nn.expert_rows import (
    can_run_on_host_rows,
    can_train_on_rows,
    run_on_host_rows,
    train_on_rows,
)
from moxe_plugin.nn.expert_states import Bank, ExpertsState, prepare_state
from moxe_plugin.nn.expert_stepping import can_step_units, step_banks, step_units
from moxe_plugin.nn.expert_steps import sort_choices
from moxe_plugin.nn.routing import Routing
from moxe_plugin.nn.rows import find_rows, pack, unpack

ExpertSteps: TypeAlias = Literal["auto", "host", "device"]
"""Who looks which experts the tokens of a step chose: the ``host``, which then computes
these only, or the ``device``, which the host needs not wait for; ``auto`` is ``device``
on accelerators, for up to ``MAX_STEP_SEQS`` sequences. Both compute the same."""


class SparseExperts(Module):
    """Applies to each token its experts, and sums their weighted outputs.

    The experts of a kind are one *bank*, a module whose parameters lead with the number
    of its experts. First come the mLSTM experts, then the sLSTM experts; or all are
    feed-forward networks.

    The paper leaves open what an expert sees; ``expert_state`` chooses:

    - ``subsequence``: in each sequence an expert recurs over the tokens routed to it,
      in order; its state waits unchanged in between;
    - ``token``: as the authors' code; every token is a sequence by itself, experts have
      no memory;
    - ``dense``: every expert recurs over all tokens, and outputs of experts that were
      not chosen are dropped. The costly upper bound.

    :param num_experts: The number of experts.
    :param mlstm: The mLSTM experts, a :class:`~moxe_plugin.nn.mlstm.MLSTMBlock`.
    :param slstm: The sLSTM experts, a :class:`~moxe_plugin.nn.slstm.SLSTMBlock`.
    :param ffn: The feed-forward experts, a
        :class:`~moxe_plugin.nn.feed_forward.GatedFeedForward`. They have no state; with
        ``expert_state="token"`` their batch has the least padding.
    :param expert_state: What an expert sees.
    :param steps: How one token of each sequence, without gradients, is computed.

    :raises ValueError: The banks do not have ``num_experts`` experts in all, or ``ffn``
        is not alone, or ``expert_state`` or ``steps`` is unknown.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        mlstm: Module | None = None,
        slstm: Module | None = None,
        ffn: Module | None = None,
        expert_state: ExpertStateKind = "subsequence",
        steps: ExpertSteps = "auto",
    ) -> None:
        super().__init__()

        if ffn is not None and (mlstm is not None or slstm is not None):
            raise ValueError("`ffn` must be None when `mlstm` or `slstm` is given.")

        banks = {"mlstm": mlstm, "slstm": slstm, "ffn": ffn}

        for name, bank in banks.items():
            self.register_module(name, bank)

        self.num_experts = num_experts

        self._bank_names = [name for name, bank in banks.items() if bank is not None]
        self._bank_sizes = [
            next(bank.parameters()).size(0)
            for bank in banks.values()
            if bank is not None
        ]

        if sum(self._bank_sizes) != num_experts:
            raise ValueError(
                f"`mlstm`, `slstm` and `ffn` must have `num_experts` ({num_experts}) "
                f"experts in all, but have {sum(self._bank_sizes)} instead."
            )

        if expert_state not in LAYOUTS:
            raise ValueError(
                f"`expert_state` must be one of {', '.join(LAYOUTS)}, but is "
                f"'{expert_state}' instead."
            )

        if steps not in get_args(ExpertSteps):
            raise ValueError(
                f"`steps` must be one of {', '.join(get_args(ExpertSteps))}, but is "
                f"'{steps}' instead."
            )

        self.steps = steps

        self._expert_state = expert_state
        self._lay_out = LAYOUTS[expert_state]

    @override
    def forward(
        self,
        seqs: Tensor,
        routing: Routing,
        seq_lens: Tensor | None = None,
        state: ExpertsState | None = None,
        *,
        return_state: bool = True,
        reuse_state: bool = False,
    ) -> tuple[Tensor, ExpertsState | None]:
        """Apply the experts.

        :param seqs: The output of the sequence mixer. *Shape:* ``(N,S,M)``.
        :param routing: Where the tokens go, ``T = N * S`` in row-major order.
        :param seq_lens: The lengths of right-padded sequences; all are full if
            ``None``. Padding goes to no expert. *Shape:* ``(N)``.
        :param state: The state after the previous chunk of the same sequences.
        :param return_state: Whether to return a state.
        :param reuse_state: Whether the tensors of ``state`` may become those of the
            state that is returned, which spares copies of all experts' memories.

        :returns: The sums, exactly 0 at padding, *Shape:* ``(N,S,M)``, and the state
            after the last token; ``None`` with ``expert_state="token"``, or if it is
            not wanted.
        """
        if self._is_step(seqs, seq_lens):
            result = self._step(
                *(seqs, routing, state),
                return_state=return_state,
                reuse_state=reuse_state,
            )
            if result is not None:
                return result

        if state is None and not return_state:
            banks = self._list_banks()

            if self._trains_on_rows(seqs):
                return train_on_rows(banks, seqs, routing, seq_lens), None

            if self._runs_on_host_rows(seqs, routing):
                return run_on_host_rows(banks, seqs, routing, seq_lens), None

        layout = self._lay_out(seqs, routing, seq_lens, self._bank_sizes)

        keeps_state = return_state and layout.has_state

        outputs: list[Tensor] = []
        states: dict[str, Any] = {"mlstm": None, "slstm": None}

        for name, grid, grid_lens in zip(
            self._bank_names, layout.grids, layout.grid_lens, strict=True
        ):
            bank = self.get_submodule(name)

            if name == "ffn":
                output = _feed_forward(bank, grid, grid_lens)
            else:
                output, states[name] = bank(
                    grid,
                    grid_lens,
                    None if state is None else getattr(state, name),
                    return_state=keeps_state,
                )

            outputs.append(output)

        # (T,M) -> (N,S,M)
        summed = layout.sum_outputs(outputs).view(seqs.shape).to(seqs.dtype)

        return summed, ExpertsState(**states) if keeps_state else None

    @property
    def steps_on_device(self) -> bool:
        """Whether a step on a GPU asks nothing of it, as a CUDA graph wants it."""
        return self._expert_state != "dense" and self.steps != "host"

    def _is_step(self, seqs: Tensor, seq_lens: Tensor | None) -> bool:
        # In training every parameter must get a gradient, also an idle expert's.
        return (
            seqs.size(1) == 1
            and seq_lens is None
            and self._expert_state != "dense"
            and not torch.is_grad_enabled()
        )

    def _trains_on_rows(self, seqs: Tensor) -> bool:
        return self._expert_state == "subsequence" and can_train_on_rows(
            self._list_banks(), seqs
        )

    def _runs_on_host_rows(self, seqs: Tensor, routing: Routing) -> bool:
        return self._expert_state == "subsequence" and can_run_on_host_rows(
            self._list_banks(), seqs, routing
        )

    def _list_banks(self) -> list[Bank]:
        begins = accumulate(self._bank_sizes, initial=0)

        return [
            Bank(name, self.get_submodule(name), begin, size)
            for name, begin, size in zip(
                self._bank_names, begins, self._bank_sizes, strict=False
            )
        ]

    def _step(
        self,
        seqs: Tensor,
        routing: Routing,
        state: ExpertsState | None,
        *,
        return_state: bool,
        reuse_state: bool,
    ) -> tuple[Tensor, ExpertsState | None] | None:
        banks, choices = self._list_banks(), None
        has_memory = self._expert_state == "subsequence"
        on_device = self.steps == "device" or (
            self.steps == "auto" and not seqs.is_cpu and seqs.size(0) <= MAX_STEP_SEQS
        )

        if not on_device:
            choices = sort_choices(routing.expert_indices)

            # All experts at once are faster then.
            if len(choices) == self.num_experts:
                return None

        keeps_state = return_state and has_memory
        in_units = on_device and has_memory and can_step_units(banks, seqs)

        if not has_memory:
            state = None
        elif keeps_state or in_units or state is not None:
            state = prepare_state(banks, seqs, state, reuse=reuse_state)

        if in_units and state is not None:
            summed = step_units(banks, seqs, routing, state)
        else:
            summed = step_banks(banks, seqs, routing, choices, state)

        return summed, state if keeps_state else None


def _feed_forward(bank: Module, grid: Tensor, grid_lens: Tensor | None) -> Tensor:
    if grid_lens is None:
        output: Tensor = bank(grid)

        return output

    rows = find_rows(grid_lens, grid.size(2))

    return unpack(bank(pack(grid, rows), rows.counts), rows)
