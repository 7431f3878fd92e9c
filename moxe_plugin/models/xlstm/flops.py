"""The FLOPs of an xLSTM's forward pass."""

from __future__ import annotations

from moxe_plugin.models.xlstm.config import XLSTMConfig
from moxe_plugin.nn.flops import linear_flops, mlstm_block_flops, slstm_block_flops


def xlstm_forward_flops(config: XLSTMConfig, context_len: int) -> float:
    """Count the FLOPs of a token's forward pass; see :mod:`moxe_plugin.nn.flops`.

    :param config: The configuration.
    :param context_len: The length of the sequence.

    :returns: FLOPs per token, the mean over the sequence.
    """
    slstm_block = slstm_block_flops(
        config.model_dim,
        num_heads=config.num_heads,
        ffn_proj_factor=config.slstm_ffn_proj_factor,
        seq_len=context_len,
    )
    mlstm_block = mlstm_block_flops(
        config.model_dim,
        num_heads=config.num_heads,
        qkv_block_size=config.qkv_block_size,
        proj_factor=config.mlstm_proj_factor,
        seq_len=context_len,
    )

    # The first of each group.
    num_slstm = len(range(0, config.num_blocks, config.slstm_period))
    num_mlstm = config.num_blocks - num_slstm

    return (
        num_slstm * slstm_block
        + num_mlstm * mlstm_block
        + linear_flops(config.model_dim, config.vocab_size)
    )
