"""MoxE as a fairseq2 causal language model."""

from __future__ import annotations

from typing import final

from fairseq2.models.transformer import TransformerFrontend
from fairseq2.nn import BatchLayout, IncrementalStateBag, Projection
from torch import Tensor
from typing_extensions import Self, override

from moxe_plugin.models.clm import AuxLossCausalLM, Prediction
from moxe_plugin.models.moxe.config import MoxEConfig
from moxe_plugin.models.moxe.decoder import MoxEDecoder
from moxe_plugin.models.packing import repack_documents, unpack_documents
from moxe_plugin.nn.loss_free import LossFreeSelection
from moxe_plugin.nn.losses import (
    difficulty_loss,
    dynamic_loss,
    group_loss,
    load_balancing_loss,
    router_z_loss,
)
from moxe_plugin.nn.routing import Routing, stack_routings
from moxe_plugin.nn.statistics import (
    count_expert_loads,
    router_stat_names,
    router_stats,
)


@final
class MoxELM(AuxLossCausalLM):
    """A Mixture of xLSTM Experts with entropy-aware routing (arXiv 2505.01459).

    Every auxiliary loss is the mean over the tokens of the local batch, then over
    layers; padding counts in none. In training, the means within the group-wise and the
    load-balancing loss are over the batches of all processes of ``balance_group``.

    The model has no position code and no fixed limit of length: ``max_seq_len`` only
    tells generators where to stop.

    :param config: The configuration.
    :param decoder_frontend: Embeds tokens.
    :param decoder: The layers.
    :param final_proj: Projects the decoder's output to logits.
    """

    has_recurrent_state = True
    has_balance_losses = True

    def __init__(
        self,
        config: MoxEConfig,
        decoder_frontend: TransformerFrontend,
        decoder: MoxEDecoder,
        final_proj: Projection,
    ) -> None:
        has_difficulty = config.router == "difficulty"
        varies_top_k = config.expert_selection in ("dynamic", "global_workspace")

        scales = {
            "router_z": config.router_z_loss_scale,
            "load_balance": config.load_balance_loss_scale,
        }
        if has_difficulty:
            scales["difficulty"] = config.difficulty_loss_scale
            scales["group"] = config.group_loss_scale
        if config.expert_selection == "dynamic":
            scales["dynamic"] = config.dynamic_loss_scale

        stat_names = router_stat_names(
            has_difficulty=has_difficulty, varies_top_k=varies_top_k
        )

        super().__init__(
            config.max_seq_len,
            config.pad_idx,
            scales,
            [f"layer_{i}/{n}" for i in range(config.num_layers) for n in stat_names],
        )

        self.config = config
        self.varies_top_k = varies_top_k
        self.adjusts_to_loads = config.expert_selection == "loss_free"
        self.decoder_frontend = decoder_frontend
        self.decoder = decoder
        self.final_proj = final_proj

    @override
    def predict(
        self,
        seqs: Tensor,
        seqs_layout: BatchLayout,
        *,
        with_terms: bool,
        with_logits: bool = True,
        state_bag: IncrementalStateBag | None = None,
    ) -> Prediction:
        hidden, routings, token_mask = self._run(seqs, seqs_layout, state_bag)

        prediction = Prediction(None, {}, {}, hidden)
        if with_logits:
            prediction = Prediction(self.final_proj(hidden), {}, {})

        if not with_terms:
            return prediction

        routing = stack_routings(routings)

        return prediction._replace(
            aux_losses=self._aux_losses(routing, token_mask),
            stats=self._stats(routing, token_mask),
            expert_loads=count_expert_loads(routing, token_mask),
        )

    def trace(
        self, seqs: Tensor, seqs_layout: BatchLayout
    ) -> tuple[Tensor, list[Routing]]:
        """Compute logits and tell where each layer sends each token.

        :param seqs: Token ids. *Shape:* ``(N,S)``.
        :param seqs_layout: Where the sequences of the batch end.

        :returns: The logits, *shape* ``(N,S,V)``, and the routing of every layer for
            the ``T = N * S`` positions, one sequence after the other; what it says of
            padding has no meaning.

        :raises ValueError: ``seqs`` is packed.
        """
        if seqs_layout.packed:
            raise ValueError("`seqs` must not be packed.")

        hidden, routings, _ = self._run(seqs, seqs_layout, None)

        return self.final_proj(hidden), routings

    def _run(
        self,
        seqs: Tensor,
        seqs_layout: BatchLayout,
        state_bag: IncrementalStateBag | None,
    ) -> tuple[Tensor, list[Routing], Tensor | None]:
        packed_layout = None
        if seqs_layout.packed:
            packed_layout = seqs_layout
            seqs, seqs_layout = unpack_documents(seqs, seqs_layout)

        seq_lens, token_mask = None, None
        if seqs_layout.padded:
            seq_lens = seqs_layout.seq_lens_pt.long()
            # (N,S) -> (T)
            token_mask = (seqs_layout.position_indices >= 0).flatten()

        # (N,S) -> (N,S,M)
        hidden, seqs_layout = self.decoder_frontend(
            seqs, seqs_layout, state_bag=state_bag
        )

        hidden, routings = self.decoder(hidden, seq_lens, state_bag=state_bag)

        if packed_layout is not None:
            # (N,S,M) -> (S,M)
            hidden = repack_documents(hidden, packed_layout)

        return hidden, routings, token_mask

    def _aux_losses(
        self, routing: Routing, token_mask: Tensor | None
    ) -> dict[str, Tensor]:
        config = self.config

        # Validation may end in one process before another.
        group = self.balance_group if self.training else None

        logits = routing.biased_logits
        if config.router_z_loss_logits == "unbiased":
            logits = routing.router_logits

        losses = {
            "router_z": router_z_loss(logits, token_mask),
            "load_balance": load_balancing_loss(
                routing.router_probs,
                routing.expert_indices,
                token_mask,
                form=config.load_balance_loss,
                group=group,
            ),
        }

        if routing.difficulty is not None:
            losses["difficulty"] = difficulty_loss(
                routing.difficulty,
                routing.unbiased_probs,
                token_mask,
                stop_gradient=config.detach_entropy_target,
            )

            losses["group"] = group_loss(
                routing.router_probs,
                config.mlstm_group_size,
                token_mask,
                form=config.group_loss,
                group=group,
            )

        if "dynamic" in self.aux_loss_scales:
            losses["dynamic"] = dynamic_loss(routing.router_probs, token_mask)

        return losses

    def _stats(self, routing: Routing, token_mask: Tensor | None) -> dict[str, Tensor]:
        stats = router_stats(
            routing,
            self.config.mlstm_group_size,
            token_mask,
            varies_top_k=self.varies_top_k,
        )
        layers = zip(*(values.unbind() for values in stats.values()), strict=True)

        return {
            f"layer_{idx}/{name}": value
            for idx, values in enumerate(layers)
            for name, value in zip(stats, values, strict=True)
        }

    @override
    def adjust_to_loads(self, expert_loads: Tensor) -> None:
        selections = (m for m in self.modules() if isinstance(m, LossFreeSelection))

        for selection, loads in zip(selections, expert_loads, strict=True):
            selection.adjust(loads)

    @override
    def requires_grad_(self, requires_grad: bool = True) -> Self:
        super().requires_grad_(requires_grad)

        # fairseq2's recipes turn on the gradients of all parameters.
        for module in self.modules():
            if isinstance(module, LossFreeSelection):
                module.load_bias.requires_grad_(False)

        return self

    @override
    def num_idle_parameters(self) -> float:
        config = self.config

        expert_params = sum(
            p.numel()
            for name, p in self.decoder.named_parameters()
            if ".experts." in name
        )
        # Where tokens differ in it, the least number of idle experts
        idle_share = 1.0 - config.largest_top_k / config.num_experts
        if config.expert_state == "dense":
            idle_share = 0.0

        return config.vocab_size * config.model_dim + idle_share * expert_params
