"""Sparse experts: send tokens to experts, weigh and sum the outputs. MoxE eq. (9)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module
from typing_extensions import override

from moxe_plugin.nn.expert_layouts import (
    LAYOUTS,
    ExpertStateKind,
    make_token_mask,
)
from moxe_plugin.nn.expert_steps import Choices, sort_choices, step_bank
from moxe_plugin.nn.ragged_dispatch import combine_rows, send_tokens
from moxe_plugin.nn.routing import Routing
from moxe_plugin.nn.rows import find_rows, pack, unpack

if TYPE_CHECKING:
    from moxe_plugin.nn.mlstm_recurrence import MLSTMState
    from moxe_plugin.nn.slstm import SLSTMState


class ExpertsState(NamedTuple):
    """The recurrent states of a layer's experts; tensors lead with ``(E,N)``."""

    mlstm: MLSTMState | None
    """The state of the mLSTM experts, if there are any."""

    slstm: SLSTMState | None
    """The state of the sLSTM experts, if there are any."""


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
        :class:`~moxe_plugin.nn.layers.GatedFeedForward`. They have no state; with
        ``expert_state="token"`` their batch has the least padding.
    :param expert_state: What an expert sees.

    :raises ValueError: The banks do not have ``num_experts`` experts in all, or ``ffn``
        is not alone, or ``expert_state`` is unknown.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        mlstm: Module | None = None,
        slstm: Module | None = None,
        ffn: Module | None = None,
        expert_state: ExpertStateKind = "subsequence",
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
    ) -> tuple[Tensor, ExpertsState | None]:
        """Apply the experts.

        :param seqs: The output of the sequence mixer. *Shape:* ``(N,S,M)``.
        :param routing: Where the tokens go, ``T = N * S`` in row-major order.
        :param seq_lens: The lengths of right-padded sequences; all are full if
            ``None``. Padding goes to no expert. *Shape:* ``(N)``.
        :param state: The state after the previous chunk of the same sequences.
        :param return_state: Whether to return a state.

        :returns: The sums, exactly 0 at padding, *Shape:* ``(N,S,M)``, and the state
            after the last token; ``None`` with ``expert_state="token"``, or if it is
            not wanted.
        """
        if self._is_step(seqs, seq_lens):
            choices = sort_choices(routing.expert_indices)

            if len(choices) < self.num_experts:
                return self._step(seqs, routing, choices, state, return_state)

        if state is None and not return_state and self._trains_on_rows(seqs):
            return self._apply_to_rows(seqs, routing, seq_lens), None

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

    def _is_step(self, seqs: Tensor, seq_lens: Tensor | None) -> bool:
        # In training every parameter must get a gradient, also an idle expert's.
        return (
            seqs.size(1) == 1
            and seq_lens is None
            and self._expert_state != "dense"
            and not torch.is_grad_enabled()
        )

    def _trains_on_rows(self, seqs: Tensor) -> bool:
        return (
            self._expert_state == "subsequence"
            and "ffn" not in self._bank_names
            and all(self._bank(name).trains_on_rows(seqs) for name in self._bank_names)
        )

    def _apply_to_rows(
        self, seqs: Tensor, routing: Routing, seq_lens: Tensor | None
    ) -> Tensor:
        plan, banks = send_tokens(
            seqs.flatten(0, 1),
            routing.expert_indices.view(*seqs.shape[:2], -1),
            make_token_mask(seqs, seq_lens),
            self._bank_sizes,
        )
        outputs = [
            self._bank(name).apply_to_rows(flat, rows)
            for name, flat, rows in zip(
                self._bank_names, banks, plan.banks, strict=True
            )
        ]

        # (T,M) -> (N,S,M)
        return combine_rows(outputs, routing.expert_weights, plan, seqs.dtype).view(
            seqs.shape
        )

    def _bank(self, name: str) -> Any:
        return self.get_submodule(name)

    def _step(
        self,
        seqs: Tensor,
        routing: Routing,
        choices: Mapping[int, Choices],
        state: ExpertsState | None,
        return_state: bool,
    ) -> tuple[Tensor, ExpertsState | None]:
        keeps_state = return_state and self._expert_state == "subsequence"

        states: dict[str, Any] = {"mlstm": None, "slstm": None}
        sums, begin = [], 0

        for name, size in zip(self._bank_names, self._bank_sizes, strict=True):
            bank: Any = self.get_submodule(name)

            bank_state = None if state is None else getattr(state, name, None)
            if keeps_state and bank_state is None and name != "ffn":
                bank_state = bank.initial_state(seqs.size(0), seqs.device)

            bank_sums, states[name] = step_bank(
                bank,
                partial(_call_bank, bank, name, keeps_state),
                {e - begin: c for e, c in choices.items() if 0 <= e - begin < size},
                seqs.squeeze(1),
                routing.expert_weights,
                bank_state,
            )

            sums.append(bank_sums)
            begin += size

        # (N,M) -> (N,1,M)
        summed = torch.stack(sums).sum(dim=0).unsqueeze(1).to(seqs.dtype)

        if not keeps_state:
            return summed, None

        return summed, ExpertsState(states["mlstm"], states["slstm"])


def _feed_forward(bank: Module, grid: Tensor, grid_lens: Tensor | None) -> Tensor:
    if grid_lens is None:
        output: Tensor = bank(grid)

        return output

    rows = find_rows(grid_lens, grid.size(2))

    return unpack(bank(pack(grid, rows), rows.counts), rows)


def _call_bank(
    bank: Module,
    name: str,
    return_state: bool,
    seqs: Tensor,
    state: Any,
    params: Mapping[str, Tensor],
) -> tuple[Tensor, Any]:
    if name == "ffn":
        return functional_call(bank, dict(params), (seqs,)), None

    options = {"return_state": return_state}

    output: tuple[Tensor, Any] = functional_call(
        bank, dict(params), (seqs, None, state), options
    )

    return output
