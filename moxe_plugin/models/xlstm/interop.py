"""Checkpoints of the xLSTM language model in the authors' MoxE code."""

from __future__ import annotations

from moxe_plugin.models.interop import AuthorsParameter, same, transposed
from moxe_plugin.models.interop_blocks import (
    mlstm_block_parameters,
    slstm_block_parameters,
)
from moxe_plugin.models.xlstm.config import XLSTMConfig


def authors_xlstm_parameters(config: XLSTMConfig) -> dict[str, AuthorsParameter]:
    """List the parameters of an xLSTM model and their names in the authors' code.

    :param config: The configuration.

    :returns: Correspondences by our name.
    """
    stack = "xlstm_block_stack"

    parameters = {
        "decoder_frontend.embed.weight": same("token_embedding/embedding"),
        "decoder.layer_norm.weight": same(f"{stack}/post_blocks_norm/scale"),
        "final_proj.weight": transposed("lm_head/kernel"),
    }

    for idx in range(config.num_blocks):
        is_slstm = idx % config.slstm_period == 0

        list_parameters = slstm_block_parameters if is_slstm else mlstm_block_parameters

        for name, parameter in list_parameters(f"{stack}/blocks/{idx}").items():
            parameters[f"decoder.layers.{idx}.block.{name}"] = parameter

    return parameters
