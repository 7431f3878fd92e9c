"""The FLOPs of MoxE's forward pass."""

from __future__ import annotations

from moxe_plugin.models.moxe.config import MoxEConfig
from moxe_plugin.nn.flops import (
    gated_ffn_flops,
    linear_flops,
    mlstm_block_flops,
    slstm_block_flops,
)


def moxe_forward_flops(config: MoxEConfig, context_len: int) -> float:
    """Count the FLOPs of a token's forward pass; see :mod:`moxe_plugin.nn.flops`.

    Tokens are taken to be spread evenly over the experts, so that ``subsequence``
    experts see sequences of ``context_len * top_k / num_experts`` tokens, rounded.
    Only the chosen experts count, and where tokens differ in their number, the largest
    number for all; with ``expert_state="dense"`` all experts compute, and count.
    Where tokens differ in their number of experts, each is taken to have the most.

    :param config: The configuration.
    :param context_len: The length of the sequence.

    :returns: FLOPs per token, the mean over the sequence.
    """
    mixer = sum(_block_flops(config, kind, context_len) for kind in config.mixer_blocks)

    router = linear_flops(config.model_dim, config.num_experts)
    if config.router == "difficulty":
        router += linear_flops(config.model_dim, 1)

    layer = mixer + router + _experts_flops(config, context_len)

    return config.num_layers * layer + linear_flops(config.model_dim, config.vocab_size)


def _experts_flops(config: MoxEConfig, context_len: int) -> float:
    num_computed = config.largest_top_k
    if config.expert_state == "dense":
        num_computed = config.num_experts

    if config.experts == "ffn":
        hidden_dim = int(config.expert_ffn_proj_factor * config.model_dim)

        return num_computed * gated_ffn_flops(config.model_dim, hidden_dim)

    mlstm_share = config.mlstm_group_size / config.num_experts

    match config.expert_state:
        case "token":
            seq_len = 1
        case "subsequence":
            seq_len = max(1, round(context_len * num_computed / config.num_experts))
        case "dense":
            seq_len = context_len

    return num_computed * (
        mlstm_share * _block_flops(config, "mlstm", seq_len)
        + (1.0 - mlstm_share) * _block_flops(config, "slstm", seq_len)
    )


def _block_flops(config: MoxEConfig, kind: str, seq_len: int) -> float:
    if kind == "mlstm":
        return mlstm_block_flops(
            config.model_dim,
            num_heads=config.num_heads,
            qkv_block_size=config.qkv_block_size,
            proj_factor=config.mlstm_proj_factor,
            seq_len=seq_len,
        )

    return slstm_block_flops(
        config.model_dim,
        num_heads=config.num_heads,
        ffn_proj_factor=config.slstm_ffn_proj_factor,
        seq_len=seq_len,
    )
