"""Checkpoints of the authors' MoxE code."""

from __future__ import annotations

from moxe_plugin.models.interop import (
    AuthorsParameter,
    same,
    squeezed,
    stacked_experts,
    transposed,
)
from moxe_plugin.models.interop_blocks import (
    ffn_expert_parameters,
    mlstm_block_parameters,
    slstm_block_parameters,
)
from moxe_plugin.models.moxe.config import MoxEConfig

_BLOCK_PARAMETERS = {
    "mlstm": mlstm_block_parameters,
    "slstm": slstm_block_parameters,
    "ffn": ffn_expert_parameters,
}


def authors_moxe_parameters(config: MoxEConfig) -> dict[str, AuthorsParameter]:
    """List the parameters of a MoxE model and their names in the authors' code.

    :param config: The configuration.

    :returns: Correspondences by our name.
    """
    parameters = {
        "decoder_frontend.embed.weight": same("moe/token_embedding/embedding"),
        "final_proj.weight": transposed("lm_head/kernel"),
    }

    if config.final_norm:
        parameters["decoder.layer_norm.weight"] = same("norm/scale")

    for layer_idx in range(config.num_layers):
        for name, parameter in _layer_parameters(config, layer_idx).items():
            parameters[f"decoder.layers.{layer_idx}.{name}"] = parameter

    return parameters


def _layer_parameters(
    config: MoxEConfig, layer_idx: int
) -> dict[str, AuthorsParameter]:
    prefix = f"moe/layers/{layer_idx}"

    parameters = {
        "mixer_norm.weight": same(f"{prefix}/sequence_mixer/post_blocks_norm/scale"),
        "router.weight": transposed(f"{prefix}/gate/router/kernel"),
    }

    if config.router_bias:
        parameters["router.bias"] = same(f"{prefix}/gate/router/bias")

    if config.router == "difficulty":
        predictor = f"{prefix}/gate/entropy_predictor"

        parameters["router.difficulty_weight"] = squeezed(f"{predictor}/kernel", 1)
        parameters["router.difficulty_bias"] = same(f"{predictor}/bias")

    for block_idx, kind in enumerate(config.mixer_blocks):
        block = _BLOCK_PARAMETERS[kind](f"{prefix}/sequence_mixer/blocks/{block_idx}")

        for name, parameter in block.items():
            parameters[f"mixer_blocks.{block_idx}.{name}"] = parameter

    for bank, experts in _banks(config).items():
        stacks = [_BLOCK_PARAMETERS[bank](f"{prefix}/experts/{e}") for e in experts]

        for name in stacks[0]:
            parameters[f"experts.{bank}.{name}"] = stacked_experts(
                [stack[name] for stack in stacks]
            )

    return parameters


def _banks(config: MoxEConfig) -> dict[str, range]:
    if config.experts == "ffn":
        return {"ffn": range(config.num_experts)}

    banks = {
        "mlstm": range(config.mlstm_group_size),
        "slstm": range(config.mlstm_group_size, config.num_experts),
    }

    return {name: experts for name, experts in banks.items() if experts}
