"""The FLOPs of Gemma 2's forward pass."""

from __future__ import annotations

from moxe_plugin.models.gemma2.config import Gemma2Config
from moxe_plugin.nn.flops import attention_flops, gated_ffn_flops, linear_flops


def gemma2_forward_flops(config: Gemma2Config, context_len: int) -> int:
    """Count the FLOPs of a token's forward pass; see :mod:`moxe_plugin.nn.flops`.

    A layer with a window counts no keys beyond it, although transformers' ``eager``
    attention computes and masks them.

    :param config: The configuration.
    :param context_len: The length of the sequence.

    :returns: FLOPs per token.
    """
    num_windowed = (config.num_layers + 1) // 2
    num_global = config.num_layers - num_windowed

    num_keys = (
        num_windowed * min(context_len, config.sliding_window)
        + num_global * context_len
    )

    q_dim = config.num_heads * config.head_dim
    kv_dim = config.num_key_value_heads * config.head_dim

    layer = (
        linear_flops(config.model_dim, q_dim + 2 * kv_dim)
        + linear_flops(q_dim, config.model_dim)
        + gated_ffn_flops(config.model_dim, config.ffn_inner_dim)
    )

    return (
        config.num_layers * layer
        + attention_flops(num_keys, config.num_heads, config.head_dim)
        + linear_flops(config.model_dim, config.vocab_size)
    )
