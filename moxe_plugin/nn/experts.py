"""Sparse experts: send tokens to experts, weigh and sum the outputs. MoxE eq. (9)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module
from typing_extensions import override

from moxe_plugin.nn.dispatch import combine, dispatch, plan_dispatch
from moxe_plugin.nn.routing import Routing

if TYPE_CHECKING:
    from moxe_plugin.nn.mlstm import MLSTMState
    from moxe_plugin.nn.slstm import SLSTMState

ExpertStateKind: TypeAlias = Literal["subsequence", "token", "dense"]


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

        if expert_state not in _LAYOUTS:
            raise ValueError(
                f"`expert_state` must be one of {', '.join(_LAYOUTS)}, but is "
                f"'{expert_state}' instead."
            )

        self._lay_out = _LAYOUTS[expert_state]

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
        layout = self._lay_out(seqs, routing, seq_lens, self._bank_sizes)

        keeps_state = return_state and layout.has_state

        outputs: list[Tensor] = []
        states: dict[str, Any] = {"mlstm": None, "slstm": None}

        for name, grid, grid_lens in zip(
            self._bank_names, layout.grids, layout.grid_lens, strict=True
        ):
            bank = self.get_submodule(name)

            if name == "ffn":
                output = bank(grid)
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


class _Layout(NamedTuple):
    # What the banks see: (E,N,L,M) each, and the lengths of rows, (E,N) each.
    grids: list[Tensor]
    grid_lens: list[Tensor | None]

    # The banks' outputs -> (T,M)
    sum_outputs: Callable[[list[Tensor]], Tensor]

    has_state: bool


def _lay_out_subsequences(
    seqs: Tensor, routing: Routing, seq_lens: Tensor | None, bank_sizes: list[int]
) -> _Layout:
    plan = plan_dispatch(
        routing.expert_indices.view(*seqs.shape[:2], -1),
        _make_token_mask(seqs, seq_lens),
        bank_sizes,
    )

    return _Layout(
        dispatch(seqs.flatten(0, 1), plan),
        [*plan.grid_lens],
        partial(combine, weights=routing.expert_weights, plan=plan),
        has_state=True,
    )


def _lay_out_tokens(
    seqs: Tensor, routing: Routing, seq_lens: Tensor | None, bank_sizes: list[int]
) -> _Layout:
    token_mask = _make_token_mask(seqs, seq_lens)

    # As if the batch were a single sequence: no expert pads more than it must.
    plan = plan_dispatch(
        routing.expert_indices.unsqueeze(0),
        None if token_mask is None else token_mask.view(1, -1),
        bank_sizes,
    )

    # (E,1,C,M) -> (E,C,1,M)
    grids = [grid.transpose(1, 2) for grid in dispatch(seqs.flatten(0, 1), plan)]

    return _Layout(
        grids,
        [None for _ in grids],
        partial(combine, weights=routing.expert_weights, plan=plan),
        has_state=False,
    )


def _lay_out_sequences(
    seqs: Tensor, routing: Routing, seq_lens: Tensor | None, bank_sizes: list[int]
) -> _Layout:
    grids = [seqs.expand(size, *seqs.shape) for size in bank_sizes]

    grid_lens = [
        None if seq_lens is None else seq_lens.expand(size, -1) for size in bank_sizes
    ]

    expert_ids = torch.arange(sum(bank_sizes), device=seqs.device)

    # (E,1,1) == (T,K) -> (E,T,K) -> (E,T)
    chosen = expert_ids[:, None, None] == routing.expert_indices
    weights = routing.expert_weights.where(chosen, 0.0).sum(dim=-1)

    token_mask = _make_token_mask(seqs, seq_lens)

    if token_mask is not None:
        weights = weights.where(token_mask.flatten(), 0.0)

    return _Layout(
        grids, grid_lens, partial(_sum_all_outputs, weights=weights), has_state=True
    )


def _sum_all_outputs(outputs: list[Tensor], weights: Tensor) -> Tensor:
    # (E,N,S,M) -> (E,T,M)
    flat_outputs = torch.cat(outputs).flatten(1, 2)

    return (flat_outputs * weights.unsqueeze(-1)).sum(dim=0)


def _make_token_mask(seqs: Tensor, seq_lens: Tensor | None) -> Tensor | None:
    if seq_lens is None:
        return None

    # (S) < (N,1) -> (N,S)
    return torch.arange(seqs.size(1), device=seqs.device) < seq_lens.unsqueeze(-1)


_LAYOUTS: Final[
    Mapping[str, Callable[[Tensor, Routing, Tensor | None, list[int]], _Layout]]
] = {
    "subsequence": _lay_out_subsequences,
    "token": _lay_out_tokens,
    "dense": _lay_out_sequences,
}
