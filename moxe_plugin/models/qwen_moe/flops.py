"""The FLOPs of Qwen-MoE's forward pass."""

from __future__ import annotations

from moxe_plugin.models.qwen_moe.config import QwenMoEConfig
from moxe_plugin.nn.flops import attention_flops, gated_ffn_flops, linear_flops


def qwen_moe_forward_flops(config: QwenMoEConfig, context_len: int) -> int:
    """Count the FLOPs of a token's forward pass; see :mod:`moxe_plugin.nn.flops`.

    :param config: The configuration.
    :param context_len: The length of the sequence.

    :returns: FLOPs per token.
    """
    model_dim = config.model_dim
    head_dim = model_dim // config.num_heads
    kv_dim = config.num_key_value_heads * head_dim

    attention = (
        linear_flops(model_dim, model_dim + 2 * kv_dim)
        + attention_flops(context_len, config.num_heads, head_dim)
        + linear_flops(model_dim, model_dim)
    )
    experts = (
        linear_flops(model_dim, config.num_experts)
        + config.top_k * gated_ffn_flops(model_dim, config.expert_inner_dim)
        + gated_ffn_flops(model_dim, config.shared_expert_inner_dim)
        # the gate of the shared expert
        + linear_flops(model_dim, 1)
    )

    return config.num_layers * (attention + experts) + linear_flops(
        model_dim, config.vocab_size
    )
