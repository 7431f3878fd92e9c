"""Routers: difficulty, bias, probabilities and the chosen experts of every token."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import Tensor, float32, promote_types
from torch.nn import Module, Parameter
from torch.nn.functional import linear, softmax
from torch.nn.init import trunc_normal_, zeros_
from typing_extensions import override

if TYPE_CHECKING:
    from moxe_plugin.nn.selection import ExpertSelection

MIN_ENTROPY_PROB: Final = 1e-6
"""Below this a probability no longer enters the logarithm of the entropy."""

TRUNCATED_NORMAL_STD: Final = 0.87962566103423978
"""Standard deviation of a unit normal cut off at two standard deviations."""


class Routing(NamedTuple):
    """Where tokens go, and everything the losses need to know about it.

    All floating-point tensors have at least float32 precision.
    """

    router_logits: Tensor
    """Expert scores before the difficulty bias, eq. (7). *Shape:* ``(T,E)``."""

    biased_logits: Tensor
    """Expert scores after the difficulty bias, eq. (7). *Shape:* ``(T,E)``."""

    router_probs: Tensor
    """Softmax of ``biased_logits``, eq. (8). *Shape:* ``(T,E)``."""

    unbiased_probs: Tensor
    """Softmax of ``router_logits``, for eq. (11). *Shape:* ``(T,E)``."""

    difficulty: Tensor | None
    """Predicted difficulty in (0, 1), eq. (5), if the router predicts one.
    *Shape:* ``(T)``."""

    expert_indices: Tensor
    """The chosen experts, the best first; int64. A place that a token leaves empty has
    :data:`~moxe_plugin.nn.selection.NO_EXPERT` (-1). *Shape:* ``(T,K)``."""

    expert_weights: Tensor
    """The weights of the chosen experts, eq. (9); 0 at empty places; rows sum to 1.
    *Shape:* ``(T,K)``."""


def stack_routings(routings: Sequence[Routing]) -> Routing:
    """Put the routings of all layers into one, as losses and statistics take it.

    So little work for each layer takes a GPU less time than a call for each.

    :param routings: The routings of the L layers.

    :returns: The routing, in whose tensors a dimension L follows that of the tokens.
    """

    # (T,…) each -> (L,T,…) -> (T,L,…): each layer's gradient is then contiguous.
    def stack(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(tensors)).transpose(0, 1)

    logits, biased, probs, unbiased, _, indices, weights = zip(*routings, strict=True)
    difficulties = [r.difficulty for r in routings if r.difficulty is not None]

    return Routing(
        stack(logits),
        stack(biased),
        stack(probs),
        stack(unbiased),
        stack(difficulties) if difficulties else None,
        stack(indices),
        stack(weights),
    )


class Router(Module, ABC):
    """Scores experts linearly, ``z = W_r h (+ b_r)``, and has a rule choose the best.

    Weights start as LeCun normal (truncated), biases as 0.

    :param model_dim: The dimensionality of the model.
    :param selection: Chooses experts by their probabilities, after the difficulty bias.
    :param bias: Whether the scores have a learned bias ``b_r``.
    """

    weight: Parameter
    bias: Parameter | None

    def __init__(
        self, model_dim: int, selection: ExpertSelection, *, bias: bool = False
    ) -> None:
        super().__init__()

        self.model_dim = model_dim
        self.num_experts = selection.num_experts
        self.selection = selection

        self.weight = Parameter(torch.empty(self.num_experts, model_dim))

        if bias:
            self.bias = Parameter(torch.empty(self.num_experts))
        else:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Reset the parameters to their initial values."""
        lecun_normal_(self.weight, fan_in=self.model_dim)

        if self.bias is not None:
            zeros_(self.bias)

    @override
    def forward(self, hidden: Tensor) -> Routing:
        """Route tokens.

        Computed in float32 (float64 if ``hidden`` is), also under autocast.

        :param hidden: The output of the sequence mixer. *Shape:* ``(T,M)``.

        :returns: The routing of every token.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            return self._route(hidden.to(promote_types(hidden.dtype, float32)))

    @abstractmethod
    def _route(self, hidden: Tensor) -> Routing: ...

    def _score(self, hidden: Tensor) -> Tensor:
        # (T,M) -> (T,E)
        bias = None if self.bias is None else self.bias.to(hidden.dtype)

        return linear(hidden, self.weight.to(hidden.dtype), bias)


class StandardRouter(Router):
    """Routes by the scores alone: MoxE eqs. (1)-(3), "MoxE-Standard".

    Parameters are those of :class:`Router`.
    """

    def __init__(
        self, model_dim: int, selection: ExpertSelection, *, bias: bool = False
    ) -> None:
        super().__init__(model_dim, selection, bias=bias)

        self.reset_parameters()

    @override
    def _route(self, hidden: Tensor) -> Routing:
        logits = self._score(hidden)

        probs = softmax(logits, dim=-1)

        return Routing(logits, logits, probs, probs, None, *self.selection(probs))


def normalized_entropy(probs: Tensor) -> Tensor:
    """Compute the entropy of distributions over experts as a share of its maximum.

    ``-sum_i p_i ln(max(p_i, 1e-6)) / ln(E)``: MoxE eq. (11). The floor inside the
    logarithm is that of the authors' code; it keeps the gradient finite.

    :param probs: Probabilities. *Shape:* ``(T,…,E)``.

    :returns: Entropies in [0, 1], no unit. *Shape:* ``(T,…)``.

    :raises ValueError: ``E`` is 1, for which normalized entropy is undefined.
    """
    num_experts = probs.size(-1)

    if num_experts < 2:
        raise ValueError(
            "The last dimension of `probs` must be at least 2, but is "
            f"{num_experts} instead."
        )

    log_probs = probs.clamp(min=MIN_ENTROPY_PROB).log()

    return (probs * log_probs).sum(dim=-1) / -math.log(num_experts)


def lecun_normal_(tensor: Tensor, *, fan_in: int) -> None:
    """Draw from a normal distribution of standard deviation ``fan_in ** -0.5``.

    As in JAX it is truncated, and wider by as much as truncation narrows it.

    :param tensor: What to fill.
    :param fan_in: The number of inputs.
    """
    std = fan_in**-0.5 / TRUNCATED_NORMAL_STD

    trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)
