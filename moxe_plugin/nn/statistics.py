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

    :param routing: The routing of a batch.
    :param token_mask: Which tokens count; all if ``None``. *Shape:* ``(T)``.

    :returns: The counts, int64. *Shape:* ``(E)``.
    """
    expert_ids = torch.arange(
        routing.router_probs.size(1), device=routing.expert_indices.device
    )

    # (T,K,1) == (E) -> (T,K,E)
    chosen = routing.expert_indices.unsqueeze(-1) == expert_ids

    if token_mask is not None:
        chosen = chosen & token_mask[:, None, None]

    return chosen.sum(dim=(0, 1))


@torch.no_grad()
def router_stats(
    routing: Routing,
    num_mlstm_experts: int,
    token_mask: Tensor | None = None,
    *,
    varies_top_k: bool = False,
) -> dict[str, Tensor]:
    """Compute statistics of one layer's routing over a batch.

    ``mlstm_share``, ``slstm_share`` and ``busiest_expert_share`` are shares, in [0, 1],
    of the assignments of a token to an expert; ``router_entropy`` is the mean
    normalized entropy of the probabilities before the bias, in [0, 1]; ``difficulty``,
    absent if the router predicts none, is the mean difficulty, in (0, 1);
    ``idle_experts`` is a count; ``experts_per_token``, absent unless it varies, is a
    mean. All are 0 for a batch without a token, except for ``idle_experts``.

    :param routing: The routing of a batch.
    :param num_mlstm_experts: How many of the first experts are mLSTM experts.
    :param token_mask: Which tokens count; all if ``None``. *Shape:* ``(T)``.
    :param varies_top_k: Whether tokens differ in their number of experts.

    :returns: Detached statistics by name, in the order of :func:`router_stat_names`.
        *Shape:* ``()`` each.
    """
    probs = routing.unbiased_probs

    if token_mask is None:
        token_mask = torch.ones_like(probs[:, 0], dtype=torch.bool)

    num_tokens = token_mask.sum().clamp(min=1)

    def mean(values: Tensor) -> Tensor:
        return values.where(token_mask, 0.0).sum() / num_tokens

    counts = count_expert_loads(routing, token_mask)

    shares = counts / counts.sum().clamp(min=1)

    stats = {
        "mlstm_share": shares[:num_mlstm_experts].sum(),
        "slstm_share": shares[num_mlstm_experts:].sum(),
        "router_entropy": mean(normalized_entropy(probs)),
    }

    if routing.difficulty is not None:
        stats["difficulty"] = mean(routing.difficulty)

    stats["busiest_expert_share"] = shares.max()
    stats["idle_experts"] = (counts == 0).sum().to(probs.dtype)

    if varies_top_k:
        stats["experts_per_token"] = counts.sum() / num_tokens

    return stats
