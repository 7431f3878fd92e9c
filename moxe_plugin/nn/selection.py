"""Which experts a token goes to: the rules of a router.

A rule looks at one token's probabilities at a time, so that routing depends neither on
later tokens nor on other sequences of the batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor
from torch.nn import Module
from typing_extensions import override

from moxe_plugin.nn.routing import normalized_entropy

NO_EXPERT: Final = -1
"""Stands in place of an expert's index where a token has fewer experts than others."""

_MOST_SEARCHES: Final = 2
"""Up to how many experts are searched one by one, rather than by sorting all."""


class ExpertSelection(Module, ABC):
    """Chooses experts by their probabilities.

    The weights of the chosen experts are their probabilities, renormalised: since no
    residual goes around the experts, weights that sum to less than 1 would shrink what
    passes through them.

    :param num_experts: The number of experts.
    """

    fixed_top_k: int | None = None
    """How many experts are chosen, if these are each token's most probable ones."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()

        self.num_experts = num_experts

    @abstractmethod
    def forward(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the experts of each token.

        :param probs: The probabilities of the experts. *Shape:* ``(T,E)``.

        :returns: The distinct chosen experts, the best first, int64, and their weights,
            which sum to 1. A place that a token leaves empty has :data:`NO_EXPERT` and
            the weight 0, and comes after all others. *Shape:* ``(T,K)`` both.
        """

    def _check_top_k(self, name: str, value: int) -> None:
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, but is {value} instead.")

        if value > self.num_experts:
            raise ValueError(
                f"`{name}` must be at most `num_experts` ({self.num_experts}), but is "
                f"{value} instead."
            )

    def _rank(self, scores: Tensor, num_ranks: int) -> Tensor:
        # Of experts with equal scores the one with the lower index comes first.
        scores = scores.detach()

        if num_ranks > _MOST_SEARCHES:
            ranked = scores.argsort(dim=-1, descending=True, stable=True)

            return ranked[:, :num_ranks]

        ranks = [scores.argmax(dim=-1, keepdim=True)]

        while len(ranks) < num_ranks:
            scores = scores.scatter(-1, ranks[-1], -math.inf)
            ranks.append(scores.argmax(dim=-1, keepdim=True))

        return torch.cat(ranks, dim=-1)

    def _weigh(
        self, probs: Tensor, ranked: Tensor, is_chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        weights = probs.gather(1, ranked)

        if is_chosen is not None:
            ranked = ranked.where(is_chosen, NO_EXPERT)
            weights = weights.where(is_chosen, 0.0)

        return ranked.contiguous(), weights / weights.sum(dim=-1, keepdim=True)

    if TYPE_CHECKING:
        __call__ = forward


class TopKSelection(ExpertSelection):
    """Chooses the ``top_k`` most probable experts: MoxE eq. (3).

    :param num_experts: The number of experts.
    :param top_k: The number of experts of each token.

    :raises ValueError: ``top_k`` is not between 1 and ``num_experts``.
    """

    def __init__(self, num_experts: int, top_k: int) -> None:
        super().__init__(num_experts)

        self._check_top_k("top_k", top_k)

        self.top_k = self.fixed_top_k = top_k

    @override
    def forward(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        return self._weigh(probs, self._rank(probs, self.top_k))


class DynamicSelection(ExpertSelection):
    """Chooses more experts for tokens whose router is less certain.

    A token gets the fewest experts whose probabilities sum to ``threshold`` or more
    (Huang et al., arXiv 2403.07652). There the weights are the bare probabilities; see
    :class:`ExpertSelection` why ours sum to 1.

    :param num_experts: The number of experts.
    :param threshold: The probability to reach, in (0, 1].
    :param max_top_k: The largest number of experts of a token, even if they do not
        reach ``threshold``; all if ``None``, as in that paper.

    :raises ValueError: ``threshold`` is not in (0, 1], or ``max_top_k`` not between 1
        and ``num_experts``.
    """

    def __init__(
        self, num_experts: int, threshold: float, max_top_k: int | None = None
    ) -> None:
        super().__init__(num_experts)

        if max_top_k is None:
            max_top_k = num_experts

        self._check_top_k("max_top_k", max_top_k)

        if not 0.0 < threshold <= 1.0:
            raise ValueError(
                "`threshold` must be greater than 0 and at most 1, but is "
                f"{threshold} instead."
            )

        self.threshold = threshold
        self.max_top_k = max_top_k

    @override
    def forward(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        ranked = self._rank(probs, self.max_top_k)

        reached = probs.detach().gather(1, ranked).cumsum(dim=1)

        # An expert is needed if the better ones do not suffice; the best always is.
        is_needed = torch.ones_like(ranked, dtype=torch.bool)
        is_needed[:, 1:] = reached[:, :-1] < self.threshold

        return self._weigh(probs, ranked, is_needed)


class GlobalWorkspaceSelection(ExpertSelection):
    """Chooses all experts for tokens whose router is uncertain, for others ``top_k``.

    A token is uncertain if the normalized entropy of its probabilities is greater than
    ``entropy_threshold`` (GW-MoE, arXiv 2406.12375). That paper does so in finetuning
    only: uncertain tokens teach all experts, and inference costs no more than before.
    An expert with memory, however, then sees fewer tokens than in training, which
    ``at_inference`` avoids.

    :param num_experts: The number of experts.
    :param top_k: The number of experts of tokens that are not uncertain.
    :param entropy_threshold: The entropy over ``ln(E)``, in [0, 1]; at 1 no token is
        uncertain.
    :param at_inference: Whether the rule holds in evaluation mode too.

    :raises ValueError: ``entropy_threshold`` is not in [0, 1], or ``top_k`` not between
        1 and ``num_experts``.
    """

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        entropy_threshold: float,
        *,
        at_inference: bool = False,
    ) -> None:
        super().__init__(num_experts)

        self._check_top_k("top_k", top_k)

        if not 0.0 <= entropy_threshold <= 1.0:
            raise ValueError(
                "`entropy_threshold` must be between 0 and 1, but is "
                f"{entropy_threshold} instead."
            )

        self.top_k = top_k
        self.entropy_threshold = entropy_threshold
        self.at_inference = at_inference

    @override
    def forward(self, probs: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training and not self.at_inference:
            return self._weigh(probs, self._rank(probs, self.top_k))

        is_uncertain = normalized_entropy(probs.detach()) > self.entropy_threshold

        ranks = torch.arange(self.num_experts, device=probs.device)

        # (E) | (T,1) -> (T,E)
        is_chosen = (ranks < self.top_k) | is_uncertain.unsqueeze(1)

        return self._weigh(probs, self._rank(probs, self.num_experts), is_chosen)
