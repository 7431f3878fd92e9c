"""Build an xLSTM language model from its configuration."""

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

from moxe_plugin.models.parallel import check_no_tensor_parallelism
from moxe_plugin.models.xlstm.config import XLSTM_FAMILY, XLSTMConfig
from moxe_plugin.models.xlstm.model import XLSTMLM, XLSTMDecoder, XLSTMDecoderLayer
from moxe_plugin.nn.layers import ScaleNorm
from moxe_plugin.nn.mlstm import MLSTMBlock
from moxe_plugin.nn.slstm import SLSTMBlock


def create_xlstm_model(config: XLSTMConfig) -> XLSTMLM:
    """Create an xLSTM language model.

    :param config: The configuration.

    :returns: The model, on the current device and of the current data type.

    :raises ValidationError: The configuration is not valid.
    :raises NotSupportedError: Tensor parallelism is on.
    """
    StandardObjectValidator().validate(config)

    check_no_tensor_parallelism(XLSTM_FAMILY)

    return XLSTMFactory(config).create_model()


class XLSTMFactory:
    """Creates the parts of an xLSTM language model.

    :param config: The configuration.
    """

    def __init__(self, config: XLSTMConfig) -> None:
        self._config = config

    def create_model(self) -> XLSTMLM:
        """Create the model."""
        return XLSTMLM(
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
        """Create the token embedding, N(0, 2/(5M)) as NX-AI's package."""
        config = self._config

        return StandardEmbedding(
            config.vocab_size, config.model_dim, config.pad_idx, init_fn=_init_embedding
        )

    def create_decoder(self) -> XLSTMDecoder:
        """Create the decoder."""
        config = self._config

        layers = [
            XLSTMDecoderLayer(self.create_block(idx))
            for idx in range(config.num_blocks)
        ]

        return XLSTMDecoder(layers, ScaleNorm(config.model_dim))

    def create_block(self, block_idx: int) -> MLSTMBlock | SLSTMBlock:
        """Create a block: sLSTM first in each group, then mLSTM."""
        config = self._config

        if block_idx % config.slstm_period == 0:
            return SLSTMBlock(
                config.model_dim,
                num_heads=config.num_heads,
                conv_kernel_size=config.conv_kernel_size,
                ffn_proj_factor=config.slstm_ffn_proj_factor,
                block_idx=block_idx,
                num_blocks=config.num_blocks,
                backend=config.backend,
            )

        return MLSTMBlock(
            config.model_dim,
            num_heads=config.num_heads,
            conv_kernel_size=config.conv_kernel_size,
            qkv_block_size=config.qkv_block_size,
            proj_factor=config.mlstm_proj_factor,
            num_blocks=config.num_blocks,
            backend=config.backend,
        )

    def create_final_projection(self) -> Projection:
        """Create the output projection, N(0, 2/(5M)), not tied to the embedding."""
        config = self._config

        return Linear(
            config.model_dim, config.vocab_size, bias=False, init_fn=_init_projection
        )


def _init_embedding(embed: StandardEmbedding) -> None:
    nn.init.normal_(embed.weight, std=(0.4 / embed.embed_dim) ** 0.5)


def _init_projection(proj: Linear) -> None:
    nn.init.normal_(proj.weight, std=(0.4 / proj.input_dim) ** 0.5)
