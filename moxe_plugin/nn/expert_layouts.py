"""What each bank of experts sees of a batch: by ``expert_state``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from moxe_plugin.nn.dispatch import combine, dispatch, plan_dispatch
from moxe_plugin.nn.routing import Routing

ExpertStateKind: TypeAlias = Literal["subsequence", "token", "dense"]


class Layout(NamedTuple):
    """What the banks see of a batch, and how their outputs become the layer's."""

    grids: list[Tensor]
    """The tokens of each bank. *Shape:* ``(E,N,L,M)`` each."""

    grid_lens: list[Tensor | None]
    """The lengths of rows; ``None`` if all are full. *Shape:* ``(E,N)`` each."""

    sum_outputs: Callable[[list[Tensor]], Tensor]
    """Weighs and sums the banks' outputs. *Shape:* as ``grids`` to ``(T,M)``."""

    has_state: bool
    """Whether experts remember what they saw."""


def _lay_out_subsequences(
    seqs: Tensor, routing: Routing, seq_lens: Tensor | None, bank_sizes: list[int]
) -> Layout:
    plan = plan_dispatch(
        routing.expert_indices.view(*seqs.shape[:2], -1),
        make_token_mask(seqs, seq_lens),
        bank_sizes,
    )

    return Layout(
        dispatch(seqs.flatten(0, 1), plan),
        [*plan.grid_lens],
        partial(combine, weights=routing.expert_weights, plan=plan),
        has_state=True,
    )


def _lay_out_tokens(
    seqs: Tensor, routing: Routing, seq_lens: Tensor | None, bank_sizes: list[int]
) -> Layout:
    token_mask = make_token_mask(seqs, seq_lens)

    # As if the batch were a single sequence: no expert pads more than it must.
    plan = plan_dispatch(
        routing.expert_indices.unsqueeze(0),
        None if token_mask is None else token_mask.view(1, -1),
        bank_sizes,
    )

    # (E,1,C,M) -> (E,C,1,M)
    grids = [grid.transpose(1, 2) for grid in dispatch(seqs.flatten(0, 1), plan)]

    return Layout(
        grids,
        [None for _ in grids],
        partial(combine, weights=routing.expert_weights, plan=plan),
        has_state=False,
    )


def _lay_out_sequences(
    seqs: Tensor, routing: Routing, seq_lens: Tensor | None, bank_sizes: list[int]
) -> Layout:
    grids = [seqs.expand(size, *seqs.shape) for size in bank_sizes]

    grid_lens = [
        None if seq_lens is None else seq_lens.expand(size, -1) for size in bank_sizes
    ]

    expert_ids = torch.arange(sum(bank_sizes), device=seqs.device)

    # (E,1,1) == (T,K) -> (E,T,K) -> (E,T)
    chosen = expert_ids[:, None, None] == routing.expert_indices
    weights = routing.expert_weights.where(chosen, 0.0).sum(dim=-1)

    token_mask = make_token_mask(seqs, seq_lens)

    if token_mask is not None:
        weights = weights.where(token_mask.flatten(), 0.0)

    return Layout(
        grids, grid_lens, partial(_sum_all_outputs, weights=weights), has_state=True
    )


def _sum_all_outputs(outputs: list[Tensor], weights: Tensor) -> Tensor:
    # (E,N,S,M) -> (E,T,M)
    flat_outputs = torch.cat(outputs).flatten(1, 2)

    return (flat_outputs * weights.unsqueeze(-1)).sum(dim=0)


def make_token_mask(seqs: Tensor, seq_lens: Tensor | None) -> Tensor | None:
    """Tell padding from tokens.

    :param seqs: *Shape:* ``(N,S,M)``.
    :param seq_lens: Where right padding begins; ``None`` without padding. *Shape:*
        ``(N)``.

    :returns: Which positions are tokens; ``None`` if all are. *Shape:* ``(N,S)``.
    """
    if seq_lens is None:
        return None

    # (S) < (N,1) -> (N,S)
    return torch.arange(seqs.size(1), device=seqs.device) < seq_lens.unsqueeze(-1)


LAYOUTS: Final[
    Mapping[str, Callable[[Tensor, Routing, Tensor | None, list[int]], Layout]]
] = {
    "subsequence": _lay_out_subsequences,
    "token": _lay_out_tokens,
    "dense": _lay_out_sequences,
}
"""How a batch is laid out, by ``expert_state``: see ``SparseExperts``."""
