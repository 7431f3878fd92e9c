"""What a MoxE model does with each token of a text: its loss and its routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fairseq2.nn import BatchLayout
from torch import Tensor
from torch.nn.functional import cross_entropy

from moxe_plugin.models.moxe.model import MoxELM
from moxe_plugin.nn.routing import Routing


@dataclass(frozen=True, kw_only=True)
class LayerTrace:
    """Where one layer sends the tokens of a text.

    Tensors are on the CPU, the floating-point ones in float32.
    """

    difficulty: Tensor | None
    """Predicted difficulty in (0, 1), MoxE eq. (5), if the router predicts one.
    *Shape:* ``(S)``."""

    router_probs: Tensor
    """Probabilities of the experts, eq. (8). *Shape:* ``(S,E)``."""

    unbiased_probs: Tensor
    """What they were without the difficulty bias. *Shape:* ``(S,E)``."""

    expert_indices: Tensor
    """The chosen experts, most probable first; int64. -1 is an empty place of a router
    that does not choose equally many for all. *Shape:* ``(S,K)``."""

    expert_weights: Tensor
    """The weights of the chosen experts, 0 at an empty place. *Shape:* ``(S,K)``."""


@dataclass(frozen=True, kw_only=True)
class TextTrace:
    """What a model does with the tokens of a text."""

    token_ids: Tensor
    """The text, without the prefix token; int64. *Shape:* ``(S)``."""

    nll_nats: Tensor
    """The loss of each token in nats, given the prefix token and all earlier tokens;
    float32. *Shape:* ``(S)``."""

    layers: Sequence[LayerTrace]
    """The routing of each token where it is read, in the order of the layers."""


@torch.inference_mode()
def trace_tokens(model: MoxELM, token_ids: Sequence[int], prefix_id: int) -> TextTrace:
    """Read a text in one pass from an empty state, and record losses and routing.

    :param model: The model; no limit of length is set here.
    :param token_ids: The text.
    :param prefix_id: The token that stands before the text.

    :returns: The trace.

    :raises ValueError: ``token_ids`` is empty.
    """
    if not token_ids:
        raise ValueError("`token_ids` must have at least one token, but is empty.")

    device = next(model.parameters()).device

    seqs = torch.tensor([[prefix_id, *token_ids]], device=device)

    logits, routings = model.trace(seqs, BatchLayout.of(seqs))

    # The token after position i is predicted there: all but the last predict.
    nll = cross_entropy(logits[0, :-1].float(), seqs[0, 1:], reduction="none")

    return TextTrace(
        token_ids=seqs[0, 1:].cpu(),
        nll_nats=nll.cpu(),
        layers=[_trace_layer(routing) for routing in routings],
    )


def _trace_layer(routing: Routing) -> LayerTrace:
    def get(tensor: Tensor) -> Tensor:
        # (1+S,...) -> (S,...): the prefix token is not of the text.
        return tensor[1:].cpu()

    difficulty = routing.difficulty

    return LayerTrace(
        difficulty=None if difficulty is None else get(difficulty).float(),
        router_probs=get(routing.router_probs).float(),
        unbiased_probs=get(routing.unbiased_probs).float(),
        expert_indices=get(routing.expert_indices),
        expert_weights=get(routing.expert_weights).float(),
    )
