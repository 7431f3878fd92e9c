"""Runs a model over a document, and keeps losses and where tokens were sent."""

from __future__ import annotations

import numpy as np
import torch
from fairseq2.models.clm import CausalLM
from fairseq2.nn import BatchLayout
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from moxe_plugin.claims.routing_measures import LayerRouting
from moxe_plugin.models.moxe.model import MoxELM
from moxe_plugin.nn.routing import Routing
from moxe_plugin.report.statistics import Array


@torch.inference_mode()
def trace_windows(
    model: CausalLM, ids: NDArray[np.int64], prefix_id: int, window_len: int
) -> tuple[Array, list[LayerRouting]]:
    """Run a model over a document in windows, each from an empty state.

    :param model: The model, in evaluation mode.
    :param ids: The document. *Shape:* ``(S)``.
    :param prefix_id: What the model reads before the first token.
    :param window_len: The length of a window in tokens.

    :returns: The loss of each token in nats, *shape* ``(S)``, and the routing of every
        layer at the tokens that are read, all but the last; no routing for a model
        without two groups of experts.
    """
    device = next(model.parameters()).device

    inputs = torch.from_numpy(np.concatenate(([prefix_id], ids[:-1])))
    windows = inputs.split(window_len)
    seq_lens = [len(window) for window in windows]

    seqs = torch.nn.utils.rnn.pad_sequence(list(windows), batch_first=True).to(device)
    layout = BatchLayout.of(seqs, seq_lens)

    routings: list[Routing] = []
    if isinstance(model, MoxELM) and count_mlstm_experts(model) is not None:
        logits, routings = model.trace(seqs, layout)
    else:
        logits = model(seqs, layout)

    # Padding is at the end of the last window only.
    num_tokens = len(ids)
    targets = torch.from_numpy(ids).to(device)
    flat_logits = logits.flatten(0, 1)[:num_tokens].float()
    nll = cross_entropy(flat_logits, targets, reduction="none")

    return (
        nll.double().cpu().numpy(),
        [_as_layer_routing(model, routing, num_tokens) for routing in routings],
    )


def _as_layer_routing(
    model: CausalLM, routing: Routing, num_tokens: int
) -> LayerRouting:
    num_mlstm = count_mlstm_experts(model)
    assert num_mlstm is not None

    def cut(values: Tensor) -> Array:
        # Without the prefix at the beginning and the padding at the end.
        return values[1:num_tokens].double().cpu().numpy()

    def log_odds(logits: Tensor) -> Array:
        mlstm, slstm = logits[:, :num_mlstm], logits[:, num_mlstm:]

        return cut(mlstm.logsumexp(dim=1) - slstm.logsumexp(dim=1))

    # An empty place of a router that chooses fewer experts has the index -1.
    indices = routing.expert_indices
    is_mlstm = (indices >= 0) & (indices < num_mlstm)
    share = is_mlstm.sum(dim=1) / (indices >= 0).sum(dim=1)

    difficulty = routing.difficulty

    return LayerRouting(
        None if difficulty is None else cut(difficulty),
        cut(share),
        log_odds(routing.biased_logits),
        log_odds(routing.router_logits),
    )


def count_mlstm_experts(model: CausalLM) -> int | None:
    """Count the experts of the mLSTM group.

    :param model: The model.

    :returns: The number; ``None`` for a model without two groups of xLSTM experts.
    """
    if not isinstance(model, MoxELM) or model.config.experts != "xlstm":
        return None

    size = model.config.mlstm_group_size

    return size if 0 < size < model.config.num_experts else None


def bias_scale(model: CausalLM) -> float:
    """Tell the scale gamma of a router whose log odds are shifted by ``2 gamma d``.

    :param model: The model.

    :returns: Gamma; 0 for a model with another modulation, or none.
    """
    if not isinstance(model, MoxELM):
        return 0.0

    is_standard = model.config.modulation == "standard"

    return model.config.difficulty_bias_scale if is_standard else 0.0
