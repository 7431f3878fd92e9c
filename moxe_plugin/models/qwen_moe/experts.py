"""What transformers' mixture of experts lacks for data-parallel training."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock


def touch_every_expert(
    block: Qwen2MoeSparseMoeBlock,
    inputs: tuple[Tensor],
    output: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Give experts without a token a gradient of zero; a forward hook.

    transformers skips such experts. Their parameters would have no gradient, which
    DDP refuses and FSDP answers with mismatched collectives.

    :param block: The mixture of experts.
    :param inputs: Its input. *Shape:* ``(N,S,M)``.
    :param output: Its output, *Shape:* ``(N,S,M)``, and router logits.

    :returns: ``output``, depending on every parameter of every expert.
    """
    if not torch.is_grad_enabled():
        return output

    seqs, router_logits = output

    # (N,S,M) -> (0,M)
    no_tokens = inputs[0].flatten(end_dim=-2)[:0]

    zero = torch.cat([expert(no_tokens) for expert in block.experts]).sum()

    return seqs + zero, router_logits
