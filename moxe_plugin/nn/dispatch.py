"""Move tokens to the experts that they chose, and back.

The tokens of an expert stand in a right-padded *grid*, one row per sequence, in the
order of the sequence. One *slot* of a grid holds one *choice*: a token and one of its
``top_k`` experts. As this is one to one, both directions and both gradients are
gathers, whose result does not depend on the order of execution; a scatter-add's would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override


class DispatchPlan(NamedTuple):
    """Which token stands where. C is T * K choices, G the slots of all grids."""

    grid_shapes: list[tuple[int, int, int]]
    """Experts, sequences and slots per row, of each grid."""

    grid_lens: list[Tensor]
    """How many slots of each row are filled, from the left. *Shape:* ``(E,N)`` each."""

    token_of_slot: Tensor
    """The token of each slot; any token if the slot is not filled. *Shape:* ``(G)``."""

    choice_of_slot: Tensor
    """As ``token_of_slot``, but the choice. *Shape:* ``(G)``."""

    is_filled: Tensor
    """Whether the slot holds a choice. *Shape:* ``(G)``."""

    slot_of_choice: Tensor
    """The slot of each choice; any slot if it was not sent. *Shape:* ``(T,K)``."""

    is_sent: Tensor | None
    """Whether the choice is a token's expert, and neither padding's nor an empty place;
    ``None`` if all are. *Shape:* ``(T,K)``."""


def plan_dispatch(
    expert_indices: Tensor, token_mask: Tensor | None, grid_sizes: Sequence[int]
) -> DispatchPlan:
    """Assign a slot to every choice.

    :param expert_indices: The distinct experts of each token; -1 at places that it
        leaves empty, to which nothing is sent. *Shape:* ``(N,S,K)``.
    :param token_mask: Which tokens to send; all if ``None``. *Shape:* ``(N,S)``.
    :param grid_sizes: How many experts share each grid: first come the experts of the
        first grid, and so on.

    :returns: The plan for ``T = N * S`` tokens.
    """
    num_seqs, _, top_k = expert_indices.shape

    device = expert_indices.device

    # (N,S,K,1) == (E) -> (N,S,K,E) -> (N,S,E)
    expert_ids = torch.arange(sum(grid_sizes), device=device)

    chosen = (expert_indices.unsqueeze(-1) == expert_ids).any(dim=2)

    if token_mask is not None:
        chosen = chosen & token_mask.unsqueeze(-1)

    num_sent = chosen.cumsum(dim=1)

    # (N,E) -> (E,N)
    grid_lens = list(torch.split(num_sent[:, -1].t(), list(grid_sizes)))

    # A grid without a token keeps a slot, so that its experts get a (zero) gradient.
    *max_lens, min_index = torch.stack(
        [*(lens.max() for lens in grid_lens), expert_indices.min()]
    ).tolist()

    row_lens = [max(n, 1) for n in max_lens]

    grid_shapes = [(e, num_seqs, n) for e, n in zip(grid_sizes, row_lens, strict=True)]

    # Slot of the first sequence's first token, and slots per sequence, per expert.
    begins, strides, num_slots = [], [], 0

    for size, row_len in zip(grid_sizes, row_lens, strict=True):
        for _ in range(size):
            begins.append(num_slots)
            strides.append(row_len)

            num_slots += num_seqs * row_len

    is_sent = None if token_mask is None else token_mask.unsqueeze(-1)

    if min_index < 0:
        is_place_used = expert_indices >= 0
        is_sent = is_place_used if is_sent is None else is_place_used & is_sent

        expert_indices = expert_indices.clamp(min=0)

    begin, stride = torch.tensor([begins, strides], device=device)[:, expert_indices]

    seq_ids = torch.arange(num_seqs, device=device)[:, None, None]

    # (N,S,K) -> (T,K)
    slot_of_choice = (
        begin + seq_ids * stride + num_sent.gather(2, expert_indices) - 1
    ).flatten(0, 1)

    if is_sent is not None:
        is_sent = is_sent.flatten(0, 1).expand(-1, top_k)

        # Padding and empty places share an extra slot, which is then cut off.
        slot_of_choice = slot_of_choice.where(is_sent, num_slots)

    choice_of_slot = torch.full((num_slots + 1,), -1, device=device)

    choice_of_slot.scatter_(
        0,
        slot_of_choice.flatten(),
        torch.arange(slot_of_choice.numel(), device=device),
    )

    choice_of_slot = choice_of_slot[:-1]

    is_filled = choice_of_slot >= 0

    choice_of_slot = choice_of_slot.clamp(min=0)

    return DispatchPlan(
        grid_shapes,
        grid_lens,
        choice_of_slot // top_k,
        choice_of_slot,
        is_filled,
        slot_of_choice if is_sent is None else slot_of_choice.where(is_sent, 0),
        is_sent,
    )


def dispatch(tokens: Tensor, plan: DispatchPlan) -> list[Tensor]:
    """Copy tokens into the slots of their experts.

    :param tokens: *Shape:* ``(T,M)``.
    :param plan: Where they go.

    :returns: The grids; what stands in slots that are not filled is finite, but
        unspecified. *Shape:* ``(E,N,L,M)`` each.
    """
    slots = _gather_rows(tokens, plan.token_of_slot, plan.slot_of_choice, plan.is_sent)

    grids = torch.split(slots, [e * n * length for e, n, length in plan.grid_shapes])

    return [
        grid.view(*shape, -1)
        for grid, shape in zip(grids, plan.grid_shapes, strict=True)
    ]


def combine(grids: Sequence[Tensor], weights: Tensor, plan: DispatchPlan) -> Tensor:
    """Sum the weighted outputs of each token's experts: MoxE eq. (9).

    The sum has the precision of ``weights``, at least.

    :param grids: The outputs of the experts. *Shape:* ``(E,N,L,M)`` each.
    :param weights: The weights of the experts. *Shape:* ``(T,K)``.
    :param plan: The plan that the inputs of the experts were dispatched with.

    :returns: The sums; exactly 0 for tokens that were not sent. *Shape:* ``(T,M)``.
    """
    if plan.is_sent is not None:
        weights = weights.where(plan.is_sent, 0.0)

    slots = torch.cat([grid.flatten(0, 2) for grid in grids])

    # (G,M) -> (C,M) -> (T,K,M)
    outputs = _gather_rows(
        slots,
        plan.slot_of_choice.flatten(),
        plan.choice_of_slot.unsqueeze(-1),
        plan.is_filled.unsqueeze(-1),
    ).view(*weights.shape, -1)

    return (outputs * weights.unsqueeze(-1)).sum(dim=1)


def _gather_rows(
    rows: Tensor, index: Tensor, inverse: Tensor, inverse_mask: Tensor | None
) -> Tensor:
    return _GatherRows.apply(rows, index, inverse, inverse_mask)  # type: ignore[no-any-return, no-untyped-call]  # torch


class _GatherRows(Function):
    # Row i of the output is row index[i] of `rows`; the outputs that count of row r
    # are inverse[r], where inverse_mask[r] is set. No gradient reaches the others.

    @staticmethod
    @override
    def forward(
        ctx: Any,
        rows: Tensor,
        index: Tensor,
        inverse: Tensor,
        inverse_mask: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(inverse, inverse_mask)

        return rows.index_select(0, index)

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, inverse_mask = ctx.saved_tensors

        # (R,J) -> (R,J,M)
        grads = grad_output.index_select(0, inverse.flatten())
        grads = grads.view(*inverse.shape, -1)

        if inverse_mask is not None:
            grads = grads.where(inverse_mask.unsqueeze(-1), 0.0)

        return grads.sum(dim=1), None, None, None
