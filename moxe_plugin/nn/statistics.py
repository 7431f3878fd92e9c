"""What a router did with a batch, in numbers for reports."""

from __future__ import annotations

import torch
from torch import Tensor

from moxe_plugin.nn.routing import Routing, normalized_entropy


def router_stat_names(*, has_difficulty: bool) -> tuple[str, ...]:
    """List the statistics that :func:`router_stats` computes.

    :param has_difficulty: Whether the router predicts a difficulty.

    :returns: Names, in the order of the statistics.
    """
    names = ["mlstm_share", "slstm_share", "router_entropy"]

    if has_difficulty:
        names.append("difficulty")

    return (*names, "busiest_expert_share", "idle_experts")


@torch.no_grad()
def router_stats(
    routing: Routing, num_mlstm_experts: int, token_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """Compute statistics of one layer's routing over a batch.

    ``mlstm_share``, ``slstm_share`` and ``busiest_expert_share`` are shares, in [0, 1],
    of the ``T * K`` assignments; ``router_entropy`` is the mean normalized entropy of
    the probabilities before the bias, in [0, 1]; ``difficulty``, absent if the router
    predicts none, is the mean difficulty, in (0, 1); ``idle_experts`` is a count. All
    are 0 for a batch without a token, except for ``idle_experts``.

    :param routing: The routing of a batch.
    :param num_mlstm_experts: How many of the first experts are mLSTM experts.
    :param token_mask: Which tokens count; all if ``None``. *Shape:* ``(T)``.

    :returns: Detached statistics by name, in the order of :func:`router_stat_names`.
        *Shape:* ``()`` each.
    """
    probs = routing.unbiased_probs

    if token_mask is None:
        token_mask = torch.ones_like(probs[:, 0], dtype=torch.bool)

    num_tokens = token_mask.sum().clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        return values.where(token_mask, 0.0).sum() / num_tokens

    expert_ids = torch.arange(probs.size(1), device=probs.device)

    # (T,K,1) == (E) -> (T,K,E)
    chosen = routing.expert_indices.unsqueeze(-1) == expert_ids

    counts = (chosen & token_mask[:, None, None]).sum(dim=(0, 1))

    shares = counts / (num_tokens * routing.expert_indices.size(1))

    stats = {
        "mlstm_share": shares[:num_mlstm_experts].sum(),
        "slstm_share": shares[num_mlstm_experts:].sum(),
        "router_entropy": mean(normalized_entropy(probs)),
    }

    if routing.difficulty is not None:
        stats["difficulty"] = mean(routing.difficulty)

    stats["busiest_expert_share"] = shares.max()
    stats["idle_experts"] = (counts == 0).sum().to(probs.dtype)

    return stats
