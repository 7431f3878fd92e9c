"""The Qwen-MoE model."""

from __future__ import annotations

from typing import Final, final

import torch
from fairseq2.nn import BatchLayout
from torch import Tensor
from transformers import Qwen2MoeForCausalLM
from transformers.utils.generic import ModelOutput
from typing_extensions import override

from moxe_plugin.models.clm import Prediction
from moxe_plugin.models.hf import HfCausalLM
from moxe_plugin.nn.losses import load_balancing_loss

LOAD_BALANCE: Final = "load_balance"


@final
class QwenMoELM(HfCausalLM):
    """A Qwen1.5-MoE language model: attention, routed experts and a shared expert.

    Its auxiliary loss ``load_balance`` is Qwen's own, ``E sum_i f_i P_i``, where
    ``f_i`` is the share of tokens that choose expert ``i`` and ``P_i`` its mean
    probability, both over the tokens of all layers together; it is ``top_k`` when even.
    transformers' own function returns 0 on every GPU but the first, and is not used.

    :param hf: The transformers model; returns router logits.
    :param max_seq_len: The maximum length of a sequence in tokens.
    :param num_layers: The number of decoder layers.
    :param top_k: The number of experts chosen for a token.
    :param load_balance_loss_scale: The weight of the balance loss.
    """

    has_balance_losses = True

    def __init__(
        self,
        hf: Qwen2MoeForCausalLM,
        max_seq_len: int,
        *,
        num_layers: int,
        top_k: int,
        load_balance_loss_scale: float,
    ) -> None:
        super().__init__(
            hf,
            max_seq_len,
            {LOAD_BALANCE: load_balance_loss_scale},
            [
                f"layer_{i}/{name}"
                for i in range(num_layers)
                for name in ("busiest_expert_share", "idle_experts")
            ],
        )

        self.top_k = top_k

    @override
    def read_output(self, output: ModelOutput, seqs_layout: BatchLayout) -> Prediction:
        # L x (T,E) -> (L,T,E)
        router_logits = torch.stack(output["router_logits"])

        router_probs = router_logits.softmax(dim=-1, dtype=torch.float32)

        # (L,T,E) -> (L,T,K)
        expert_indices = router_probs.topk(self.top_k).indices

        token_mask = seqs_layout.position_indices.flatten() >= 0

        loss = self.top_k * load_balancing_loss(
            router_probs.flatten(end_dim=1),
            expert_indices.flatten(end_dim=1),
            token_mask.repeat(len(router_probs)),
            # Validation may end in one process before another.
            group=self.balance_group if self.training else None,
        )

        stats: dict[str, Tensor] = {}
        loads = []

        for i, indices in enumerate(expert_indices):
            # (T,K) -> (E)
            counts = (
                indices[token_mask].flatten().bincount(minlength=router_probs.size(-1))
            )

            stats[f"layer_{i}/busiest_expert_share"] = counts.max() / counts.sum()
            stats[f"layer_{i}/idle_experts"] = (counts == 0).sum().float()

            loads.append(counts)

        return Prediction(
            None, {LOAD_BALANCE: loss}, stats, expert_loads=torch.stack(loads)
        )

    @override
    def num_idle_parameters(self) -> float:
        expert_params = sum(
            p.numel() for name, p in self.hf.named_parameters() if ".experts." in name
        )
        idle_share: float = 1.0 - self.top_k / self.hf.config.num_experts

        return super().num_idle_parameters() + idle_share * expert_params
