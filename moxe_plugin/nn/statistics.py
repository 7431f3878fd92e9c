"""What a router did with a batch, in numbers for reports."""

from __future__ import annotations

import torch
from torch import Tensor

from moxe_plugin.nn.routing import Routing, normalized_entropy


def router_stat_names(
    *, has_difficulty: bool, varies_top_k: bool = False
) -> tuple[str, ...]:
    """List the statistics that :func:`router_stats` computes.

    :param has_difficulty: Whether the router predicts a difficulty.
    :param varies_top_k: Whether tokens differ in their number of experts.

    :returns: Names, in the order of the statistics.
    """
    names = ["mlstm_share", "slstm_share", "router_entropy"]

    if has_difficulty:
        names.append("difficulty")

    names += ["busiest_expert_share", "idle_experts"]

    if varies_top_k:
        names.append("experts_per_token")

    return tuple(names)


@torch.no_grad()
def count_expert_loads(routing: Routing, token_mask: Tensor | None = None) -> Tensor:
    """Count the tokens that each expert gets.

    :param routing: The routing of a batch, of one layer or of a stack of them (see
        :func:`~moxe_plugin.nn.routing.stack_routings`).
    :param token_mask: Which tokens count; all if ``None``. *Shape:* ``(T)``.

    :returns: The counts, int64. *Shape:* ``([L,]E)``.
    """
    indices = routing.expert_indices
    expert_ids = torch.arange(routing.router_probs.size(-1), device=indices.device)

    # (T,[L,]K,1) == (E) -> (T,[L,]K,E)
    chosen = indices.unsqueeze(-1) == expert_ids

    if token_mask is not None:
        chosen = chosen & token_mask.view(-1, *[1] * (chosen.ndim - 1))

    return chosen.sum(dim=(0, -2))


@torch.no_grad()
def router_stats(
    routing: Routing,
    num_mlstm_experts: int,
    token_mask: Tensor | None = None,
    *,
    varies_top_k: bool = False,
) -> dict[str, Tensor]:
    """Compute statistics of each layer's routing over a batch.

    ``mlstm_share``, ``slstm_share`` and ``busiest_expert_share`` are shares, in [0, 1],
    of the assignments of a token to an expert; ``router_entropy`` is the mean
    normalized entropy of the probabilities before the bias, in [0, 1]; ``difficulty``,
    absent if the router predicts none, is the mean difficulty, in (0, 1);
    ``idle_experts`` is a count; ``experts_per_token``, absent unless it varies, is a
    mean. All are 0 for a batch without a token, except for ``idle_experts``.

    :param routing: The routing of a batch, of one layer or of a stack of them (see
        :func:`~moxe_plugin.nn.routing.stack_routings`).
    :param num_mlstm_experts: How many of the first experts are mLSTM experts.
    :param token_mask: Which tokens count; all if ``None``. *Shape:* ``(T)``.
    :param varies_top_k: Whether tokens differ in their number of experts.

    :returns: Detached statistics by name, in the order of :func:`router_stat_names`.
        *Shape:* ``()``, or ``(L)``, each.
    """
    probs = routing.unbiased_probs

    num_tokens: int | Tensor = max(len(probs), 1)

    if token_mask is not None:
        num_tokens = token_mask.sum().clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        if token_mask is not None:
            values = values.where(token_mask.view(-1, *[1] * (values.ndim - 1)), 0.0)

        return values.sum(dim=0) / num_tokens

    counts = count_expert_loads(routing, token_mask)
    num_assigned = counts.sum(dim=-1)

    shares = counts / num_assigned.clamp(min=1).unsqueeze(-1)

    stats = {
        "mlstm_share": shares[..., :num_mlstm_experts].sum(dim=-1),
        "slstm_share": shares[..., num_mlstm_experts:].sum(dim=-1),
        "router_entropy": mean(normalized_entropy(probs)),
    }

    if routing.difficulty is not None:
        stats["difficulty"] = mean(routing.difficulty)

    stats["busiest_expert_share"] = shares.amax(dim=-1)
    stats["idle_experts"] = (counts == 0).sum(dim=-1, dtype=probs.dtype)

    if varies_top_k:
        stats["experts_per_token"] = num_assigned / num_tokens

    return stats
