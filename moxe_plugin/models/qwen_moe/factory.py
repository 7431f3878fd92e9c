"""Build Qwen-MoE models."""

from __future__ import annotations

from fairseq2.utils.validation import StandardObjectValidator
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from moxe_plugin.models.parallel import check_no_tensor_parallelism
from moxe_plugin.models.qwen_moe.config import QWEN_MOE_FAMILY, QwenMoEConfig
from moxe_plugin.models.qwen_moe.experts import touch_every_expert
from moxe_plugin.models.qwen_moe.model import QwenMoELM


def create_qwen_moe_model(config: QwenMoEConfig) -> QwenMoELM:
    """Create a Qwen-MoE model on the current device, in the current data type.

    :param config: The configuration.

    :returns: The model with the initial weights of transformers.

    :raises ValidationError: The configuration is not valid.
    :raises NotSupportedError: Tensor parallelism is on.
    """
    StandardObjectValidator().validate(config)

    check_no_tensor_parallelism(QWEN_MOE_FAMILY)

    return QwenMoEFactory(config).create_model()


class QwenMoEFactory:
    """Creates the parts of a Qwen-MoE model.

    :param config: The configuration.
    """

    def __init__(self, config: QwenMoEConfig) -> None:
        self._config = config

    def create_model(self) -> QwenMoELM:
        """Create the model.

        :returns: The model.
        """
        config = self._config

        return QwenMoELM(
            self.create_hf_model(),
            config.max_seq_len,
            num_layers=config.num_layers,
            top_k=config.top_k,
            load_balance_loss_scale=config.load_balance_loss_scale,
        )

    def create_hf_model(self) -> Qwen2MoeForCausalLM:
        """Create the transformers model, in which no expert is ever left out.

        :returns: The model.
        """
        hf = Qwen2MoeForCausalLM(self.create_hf_config())

        for module in hf.modules():
            if isinstance(module, Qwen2MoeSparseMoeBlock):
                module.register_forward_hook(touch_every_expert)

        return hf

    def create_hf_config(self) -> Qwen2MoeConfig:
        """Translate the configuration.

        Attention is torch's ``sdpa``: the model caps no logits.

        :returns: The configuration in transformers' words.
        """
        config = self._config

        return Qwen2MoeConfig(
            vocab_size=config.vocab_size,
            pad_token_id=config.pad_idx,
            max_position_embeddings=config.max_seq_len,
            hidden_size=config.model_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_key_value_heads,
            num_experts=config.num_experts,
            num_experts_per_tok=config.top_k,
            moe_intermediate_size=config.expert_inner_dim,
            shared_expert_intermediate_size=config.shared_expert_inner_dim,
            # For those who train an exported model; the loss is ours here.
            router_aux_loss_coef=config.load_balance_loss_scale,
            output_router_logits=True,
            attn_implementation="sdpa",
        )
