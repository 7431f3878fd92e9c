"""Build a MoxE model from its configuration."""

from __future__ import annotations

from fairseq2.models.transformer import (
    TransformerEmbeddingFrontend,
    TransformerFrontend,
)
from fairseq2.nn import (
    Embedding,
    Linear,
    Projection,
    StandardEmbedding,
)
from fairseq2.utils.validation import StandardObjectValidator
from torch import nn

from moxe_plugin.models.moxe.config import MOXE_FAMILY, MoxEConfig
from moxe_plugin.models.moxe.decoder import MoxEDecoder, MoxEDecoderLayer
from moxe_plugin.models.moxe.model import MoxELM
from moxe_plugin.models.parallel import check_no_tensor_parallelism
from moxe_plugin.nn.difficulty_router import DifficultyRouter
from moxe_plugin.nn.experts import SparseExperts
from moxe_plugin.nn.feed_forward import GatedFeedForward
from moxe_plugin.nn.layers import ScaleNorm
from moxe_plugin.nn.loss_free import LossFreeSelection
from moxe_plugin.nn.mlstm import MLSTMBlock
from moxe_plugin.nn.modulation import (
    MaskedModulation,
    Modulation,
    ProportionalModulation,
    standard_modulation,
)
from moxe_plugin.nn.routing import StandardRouter
from moxe_plugin.nn.selection import (
    DynamicSelection,
    ExpertSelection,
    GlobalWorkspaceSelection,
    TopKSelection,
)
from moxe_plugin.nn.slstm import SLSTMBlock


def create_moxe_model(config: MoxEConfig) -> MoxELM:
    """Create a MoxE model.

    :param config: The configuration.

    :returns: The model, on the current device and of the current data type.

    :raises ValidationError: The configuration is not valid.
    :raises NotSupportedError: Tensor parallelism is on.
    """
    StandardObjectValidator().validate(config)

    check_no_tensor_parallelism(MOXE_FAMILY)

    return MoxEFactory(config).create_model()


class MoxEFactory:
    """Creates the parts of a MoxE model.

    :param config: The configuration.
    """

    def __init__(self, config: MoxEConfig) -> None:
        self._config = config

    def create_model(self) -> MoxELM:
        """Create the model."""
        return MoxELM(
            self._config,
            self.create_decoder_frontend(),
            self.create_decoder(),
            self.create_final_projection(),
        )

    def create_decoder_frontend(self) -> TransformerFrontend:
        """Create the frontend: an embedding, neither scaled nor given positions."""
        return TransformerEmbeddingFrontend(
            self._config.model_dim,
            self.create_embedding(),
            pos_encoder=None,
            no_scale=True,
        )

    def create_embedding(self) -> Embedding:
        """Create the token embedding, N(0, 1/M) as the authors' code."""
        config = self._config

        return StandardEmbedding(
            config.vocab_size, config.model_dim, config.pad_idx, init_fn=_init_embedding
        )

    def create_decoder(self) -> MoxEDecoder:
        """Create the decoder."""
        config = self._config

        layers = [self.create_decoder_layer(idx) for idx in range(config.num_layers)]

        return MoxEDecoder(
            layers, self.create_layer_norm() if config.final_norm else None
        )

    def create_decoder_layer(self, layer_idx: int) -> MoxEDecoderLayer:
        """Create a decoder layer."""
        kinds = self._config.mixer_blocks

        # A token passes the mixer's blocks and an expert in every layer.
        block_idx = layer_idx * (len(kinds) + 1)

        mixer_blocks = [
            self.create_mlstm_block()
            if kind == "mlstm"
            else self.create_slstm_block(block_idx + idx)
            for idx, kind in enumerate(kinds)
        ]

        return MoxEDecoderLayer(
            mixer_blocks,
            self.create_layer_norm(),
            self.create_router(),
            self.create_experts(block_idx + len(kinds)),
        )

    def create_mlstm_block(self, num_experts: int | None = None) -> MLSTMBlock:
        """Create one mLSTM block, or a stack of experts."""
        config = self._config

        return MLSTMBlock(
            config.model_dim,
            num_heads=config.num_heads,
            conv_kernel_size=config.conv_kernel_size,
            qkv_block_size=config.qkv_block_size,
            proj_factor=config.mlstm_proj_factor,
            num_experts=num_experts,
            num_blocks=self._num_blocks,
            backend=config.backend,
        )

    def create_slstm_block(
        self, block_idx: int, num_experts: int | None = None
    ) -> SLSTMBlock:
        """Create one sLSTM block, or a stack of experts."""
        config = self._config

        return SLSTMBlock(
            config.model_dim,
            num_heads=config.num_heads,
            conv_kernel_size=config.conv_kernel_size,
            ffn_proj_factor=config.slstm_ffn_proj_factor,
            num_experts=num_experts,
            block_idx=block_idx,
            num_blocks=self._num_blocks,
            backend=config.backend,
        )

    @property
    def _num_blocks(self) -> int:
        return self._config.num_layers * (len(self._config.mixer_blocks) + 1)

    def create_router(self) -> DifficultyRouter | StandardRouter:
        """Create the router: MoxE eqs. (5)-(8)."""
        config = self._config

        selection = self.create_selection()

        if config.router == "standard":
            return StandardRouter(config.model_dim, selection, bias=config.router_bias)

        return DifficultyRouter(
            config.model_dim,
            selection,
            num_mlstm_experts=config.mlstm_group_size,
            difficulty_bias_scale=config.difficulty_bias_scale,
            modulation=self.create_modulation(),
            bias=config.router_bias,
            backend=config.backend,
        )

    def create_selection(self) -> ExpertSelection:
        """Create the rule by which the router chooses: MoxE eq. (3), or another."""
        config = self._config

        num_experts, top_k = config.num_experts, config.top_k

        match config.expert_selection:
            case "top_k":
                return TopKSelection(num_experts, top_k)
            case "dynamic":
                return DynamicSelection(
                    num_experts, config.dynamic_threshold, config.max_top_k
                )
            case "global_workspace":
                return GlobalWorkspaceSelection(
                    num_experts,
                    top_k,
                    config.workspace_threshold,
                    at_inference=config.workspace_at_inference,
                )
            case "loss_free":
                return LossFreeSelection(num_experts, top_k, config.load_bias_rate)

    def create_modulation(self) -> Modulation:
        """Create what turns a difficulty into the strength of the bias, eq. (6)."""
        config = self._config

        match config.modulation:
            case "standard":
                return standard_modulation
            case "masked":
                return MaskedModulation(config.difficulty_threshold)
            case "proportional":
                return ProportionalModulation(config.difficulty_threshold)

    def create_experts(self, block_idx: int) -> SparseExperts:
        """Create the experts of a layer: MoxE eq. (9)."""
        config = self._config

        if config.experts == "ffn":
            hidden_dim = int(config.expert_ffn_proj_factor * config.model_dim)

            ffn = GatedFeedForward(
                config.model_dim,
                hidden_dim,
                up_std=config.model_dim**-0.5,
                down_std=hidden_dim**-0.5,
                num_experts=config.num_experts,
            )

            return SparseExperts(
                config.num_experts, ffn=ffn, expert_state=config.expert_state
            )

        num_mlstm = config.mlstm_group_size
        num_slstm = config.num_experts - num_mlstm
        return SparseExperts(
            config.num_experts,
            mlstm=self.create_mlstm_block(num_mlstm) if num_mlstm else None,
            slstm=self.create_slstm_block(block_idx, num_slstm) if num_slstm else None,
            expert_state=config.expert_state,
        )

    def create_layer_norm(self) -> ScaleNorm:
        """Create a LayerNorm with a scale and no bias."""
        return ScaleNorm(self._config.model_dim)

    def create_final_projection(self) -> Projection:
        """Create the output projection, N(0, 1/M), not tied to the embedding."""
        config = self._config

        return Linear(
            config.model_dim, config.vocab_size, bias=False, init_fn=_init_projection
        )


def _init_embedding(embed: StandardEmbedding) -> None:
    nn.init.normal_(embed.weight, std=embed.embed_dim**-0.5)


def _init_projection(proj: Linear) -> None:
    nn.init.normal_(proj.weight, std=proj.input_dim**-0.5)
