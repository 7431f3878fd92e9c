"""Auxiliary losses: MoxE eqs. (10)-(20), and one more for a dynamic number of experts.

Each is the mean over tokens, in float32. Where tensors have more dimensions, behind
that of the tokens, such as that of the layers, it is also the mean over these.

Those that balance the load compare means over a batch, and so depend on what the batch
is: the sum of two batches' losses is not the loss of both. As is usual, the batch is
that of this process, in a single forward pass. With a ``group`` it is that of all its
processes; each then gets the same loss, and must weigh it by its share of the targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor, float32, promote_types
from torch.distributed import ProcessGroup, all_reduce
from torch.distributed.nn.functional import all_reduce as differentiable_all_reduce

from moxe_plugin.nn.routing import normalized_entropy

GROUP_LOSS_EPS: Final = 1e-8
"""Keeps the logarithms of :func:`group_loss` finite; the value of the authors' code."""

GroupLossForm: TypeAlias = Literal["kl", "squared_difference", "bounded", "js"]

LoadBalancingForm: TypeAlias = Literal["switch", "squared"]


def difficulty_loss(
    difficulty: Tensor,
    router_probs: Tensor,
    token_mask: Tensor | None = None,
    *,
    stop_gradient: bool = False,
) -> Tensor:
    """Pull the predicted difficulty towards the router's own uncertainty.

    ``mean((difficulty - H(router_probs) / ln(E)) ** 2)``: MoxE eqs. (10), (11), where
    ``H`` is the entropy in nats. Computed in float32 (float64 stays float64).

    :param difficulty: Predicted difficulty in [0, 1]. *Shape:* ``(T,…)``.
    :param router_probs: Routing probabilities before the bias. *Shape:* ``(T,…,E)``.
    :param token_mask: Which tokens count; all if ``None``. *Shape:* ``(T)``.
    :param stop_gradient: Whether the entropy is a constant target. The paper leaves
        this open; by default, as in the authors' code, it is not.

    :returns: The mean over tokens, no unit. *Shape:* ``()``.
    """
    entropy = normalized_entropy(_at_least_float32(router_probs))

    if stop_gradient:
        entropy = entropy.detach()

    errors = (_at_least_float32(difficulty) - entropy).square()

    return _mean(errors, token_mask).mean()


def group_loss(
    router_probs: Tensor,
    num_mlstm_experts: int,
    token_mask: Tensor | None = None,
    *,
    form: GroupLossForm = "kl",
    group: ProcessGroup | None = None,
) -> Tensor:
    """Pull the probabilities of the two groups of experts towards one half each.

    With ``p_m`` the mean probability of the mLSTM experts and ``p_s`` that of all
    others, MoxE eqs. (12)-(18):

    - ``kl``: ``p_m ln(2 p_m) + p_s ln(2 p_s)``, the paper's form;
    - ``squared_difference``: ``(p_m - p_s) ** 2``;
    - ``bounded``: ``(p_m - 1/2) ** 2 + (p_s - 1/2) ** 2``;
    - ``js``: the Jensen-Shannon divergence from ``(1/2, 1/2)``, in nats.

    As in the authors' code, 1e-8 is added inside the logarithms. Computed in float32
    (float64 stays float64).

    :param router_probs: Routing probabilities after the bias. *Shape:*
        ``(T,…,E)``.
    :param num_mlstm_experts: How many of the first experts are mLSTM experts.
    :param token_mask: Which tokens count; all if ``None``. *Shape:* ``(T)``.
    :param form: Which of the forms to compute.
    :param group: The processes whose tokens are the batch; this one's if ``None``.

    :returns: One value for the batch, in nats for ``kl`` and ``js``. *Shape:* ``()``.

    :raises ValueError: ``form`` is unknown.
    """
    _check_form(form, _GROUP_LOSS_FORMS)

    probs = _at_least_float32(router_probs)

    # (T,…,E) -> (…,E)
    mean_probs = _mean(probs, token_mask, group)

    parts = mean_probs.tensor_split([num_mlstm_experts], dim=-1)
    group_probs = torch.stack([part.sum(dim=-1) for part in parts])

    return _GROUP_LOSS_FORMS[form](group_probs).mean()


def router_z_loss(logits: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Keep the logits of a router small.

    ``mean(logsumexp(logits) ** 2)``: MoxE eq. (19). Computed in float32 (float64 stays
    float64).

    :param logits: Router logits. The paper leaves open which; the authors' code takes
        those after the bias. *Shape:* ``(T,…,E)``.
    :param token_mask: Which tokens count; all if ``None``. *Shape:* ``(T)``.

    :returns: The mean over tokens, no unit. *Shape:* ``()``.
    """
    log_sums = _at_least_float32(logits).logsumexp(dim=-1)

    return _mean(log_sums.square(), token_mask).mean()


def load_balancing_loss(
    router_probs: Tensor,
    expert_indices: Tensor,
    token_mask: Tensor | None = None,
    *,
    form: LoadBalancingForm = "switch",
    group: ProcessGroup | None = None,
) -> Tensor:
    """Keep the load of experts even.

    - ``switch``: ``E sum_i f_i P_i``, MoxE eq. (20), where ``f_i`` is the share of all
      assignments of a token to an expert, ``T * K`` if no place is empty, that expert
      ``i`` gets, and ``P_i`` its mean probability; 1 when even;
    - ``squared``, the authors' code: ``sum_i (u_i - 1/E) ** 2``, where ``u_i`` is the
      sum of the probabilities, not renormalised, of the tokens that chose ``i``, over
      the number of assignments.

    The gradient flows through the probabilities. Computed in float32 (float64 stays
    float64).

    :param router_probs: Routing probabilities after the bias. *Shape:*
        ``(T,…,E)``.
    :param expert_indices: The experts of each token; -1 at empty places. *Shape:*
        ``(T,…,K)``.
    :param token_mask: Which tokens count; all if ``None``. *Shape:* ``(T)``.
    :param form: Which of the forms to compute.
    :param group: The processes whose tokens are the batch; this one's if ``None``.

    :returns: One value for the batch, no unit. *Shape:* ``()``.

    :raises ValueError: ``form`` is unknown.
    """
    _check_form(form, _LOAD_BALANCING_FORMS)

    probs = _at_least_float32(router_probs)

    expert_ids = torch.arange(probs.size(-1), device=probs.device)

    # (T,…,K,1) == (E) -> (T,…,K,E) -> (T,…,E)
    chosen = (expert_indices.unsqueeze(-1) == expert_ids).any(dim=-2).to(probs.dtype)

    # (T,…) -> (…)
    num_per_token = _mean(chosen.sum(dim=-1), token_mask, group)

    # Of no token at all the load is 0.
    assigned = chosen / num_per_token.clamp(min=1).unsqueeze(-1)

    return _LOAD_BALANCING_FORMS[form](probs, assigned, token_mask, group).mean()


def dynamic_loss(router_probs: Tensor, token_mask: Tensor | None = None) -> Tensor:
    """Make a router certain, so that few experts reach a threshold of probability.

    ``mean(-sum_i p_i ln(p_i))``, the mean entropy: the "dynamic loss" of Huang et al.,
    arXiv 2403.07652. Computed in float32 (float64 stays float64).

    :param router_probs: Routing probabilities by which experts are chosen. *Shape:*
        ``(T,…,E)``.
    :param token_mask: Which tokens count; all if ``None``. *Shape:* ``(T)``.

    :returns: The mean over tokens in nats. *Shape:* ``()``.
    """
    entropy = normalized_entropy(_at_least_float32(router_probs))

    return math.log(router_probs.size(-1)) * _mean(entropy, token_mask).mean()


def _check_form(form: str, forms: Mapping[str, object]) -> None:
    if form not in forms:
        known = ", ".join(forms)

        raise ValueError(f"`form` must be one of {known}, but is '{form}' instead.")


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(promote_types(tensor.dtype, float32))


def _mean(
    values: Tensor, token_mask: Tensor | None, group: ProcessGroup | None = None
) -> Tensor:
    # (T,...) -> (...)
    if group is not None:
        return _mean_over(group, values, token_mask)

    if token_mask is None:
        return values.mean(dim=0)

    return _sum(values, token_mask) / token_mask.sum().clamp(min=1)


def _mean_over(
    group: ProcessGroup, values: Tensor, token_mask: Tensor | None
) -> Tensor:
    if token_mask is None:
        token_mask = torch.ones(len(values), dtype=torch.bool, device=values.device)

    num_tokens = token_mask.sum()

    all_reduce(num_tokens, group=group)

    # Backward, it sums what the processes' losses say of the common mean.
    total = differentiable_all_reduce(_sum(values, token_mask), group=group)
    assert isinstance(total, Tensor)

    return total / num_tokens.clamp(min=1)


def _sum(values: Tensor, token_mask: Tensor) -> Tensor:
    mask = token_mask.view(-1, *[1] * (values.ndim - 1))

    return values.where(mask, 0.0).sum(dim=0)


def _kl_divergence(group_probs: Tensor) -> Tensor:
    return (group_probs * (2 * group_probs + GROUP_LOSS_EPS).log()).sum(dim=0)


def _squared_difference(group_probs: Tensor) -> Tensor:
    return (group_probs[0] - group_probs[1]).square()


def _bounded(group_probs: Tensor) -> Tensor:
    return (group_probs - 0.5).square().sum(dim=0)


def _js_divergence(group_probs: Tensor) -> Tensor:
    middle = (group_probs + 0.5) / 2

    forward = group_probs * (group_probs / middle + GROUP_LOSS_EPS).log()
    backward = 0.5 * (0.5 / middle + GROUP_LOSS_EPS).log()

    return (forward + backward).sum(dim=0) / 2


def _switch(
    probs: Tensor,
    assigned: Tensor,
    token_mask: Tensor | None,
    group: ProcessGroup | None,
) -> Tensor:
    shares = _mean(assigned, token_mask, group)

    return probs.size(-1) * (shares * _mean(probs, token_mask, group)).sum(dim=-1)


def _squared(
    probs: Tensor,
    assigned: Tensor,
    token_mask: Tensor | None,
    group: ProcessGroup | None,
) -> Tensor:
    usage = _mean(assigned * probs, token_mask, group)

    return (usage - 1 / probs.size(-1)).square().sum(dim=-1)


_GROUP_LOSS_FORMS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "kl": _kl_divergence,
    "squared_difference": _squared_difference,
    "bounded": _bounded,
    "js": _js_divergence,
}

_LOAD_BALANCING_FORMS: Final[
    Mapping[str, Callable[[Tensor, Tensor, Tensor | None, ProcessGroup | None], Tensor]]
] = {"switch": _switch, "squared": _squared}
