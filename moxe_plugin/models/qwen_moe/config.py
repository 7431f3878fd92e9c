"""Configuration and named architectures of Qwen1.5-MoE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fairseq2.runtime.config_registry import ConfigRegistrar
from fairseq2.runtime.dependency import DependencyContainer
from fairseq2.utils.validation import Validatable, ValidationResult
from typing_extensions import override

from moxe_plugin.models.validation import (
    check_counts,
    check_scales,
    check_vocabulary,
)

QWEN_MOE_FAMILY: Final = "qwen_moe"


@dataclass(kw_only=True)
class QwenMoEConfig(Validatable):
    """Holds the configuration of a Qwen1.5-MoE model.

    The default values are those of the MoxE paper's Table 1 (350M). What is no field
    here has the value that transformers gives to Qwen2-MoE: biases of q, k and v,
    weights of chosen experts that are not renormalised, the initial standard deviation
    0.02, rotary positions, untied embeddings.
    """

    vocab_size: int = 49_152
    """The size of the vocabulary."""

    pad_idx: int | None = None
    """The id of the padding token; ``None`` if the vocabulary has none."""

    max_seq_len: int = 256
    """The maximum length of a sequence in tokens."""

    model_dim: int = 640
    """The dimensionality of the residual stream."""

    num_layers: int = 10
    """The number of decoder layers; each has experts."""

    num_heads: int = 16
    """The number of attention heads."""

    num_key_value_heads: int = 16
    """The number of key and value heads."""

    num_experts: int = 6
    """The number of routed experts in a layer."""

    top_k: int = 2
    """The number of experts chosen for a token."""

    expert_inner_dim: int = 1_408
    """The inner dimensionality of a routed expert."""

    shared_expert_inner_dim: int = 5_632
    """The inner dimensionality of the expert that sees every token."""

    load_balance_loss_scale: float = 1e-3
    """The weight of the balance loss; transformers' ``router_aux_loss_coef``."""

    @override
    def validate(self) -> ValidationResult:
        result = ValidationResult()

        check_vocabulary(self, result)

        counts = ["max_seq_len", "model_dim", "num_layers", "num_experts"]

        counts += ["expert_inner_dim", "shared_expert_inner_dim"]

        check_counts(self, counts, result)

        if self.num_heads < 1 or self.model_dim % (2 * self.num_heads) != 0:
            result.add_error(
                f"`model_dim` ({self.model_dim}) must be an even multiple of "
                f"`num_heads`, but that is {self.num_heads}."
            )

        if self.num_key_value_heads < 1 or self.num_heads % self.num_key_value_heads:
            result.add_error(
                f"`num_heads` ({self.num_heads}) must be a multiple of "
                f"`num_key_value_heads`, but that is {self.num_key_value_heads}."
            )

        if not 1 <= self.top_k <= self.num_experts:
            result.add_error(
                f"`top_k` must be between 1 and `num_experts` ({self.num_experts}), "
                f"but is {self.top_k} instead."
            )

        check_scales(self, ["load_balance_loss_scale"], result)

        return result


def register_qwen_moe_configs(container: DependencyContainer) -> None:
    """Register the named architectures of Qwen-MoE.

    :param container: fairseq2's dependency container.
    """
    arch = ConfigRegistrar(container, QwenMoEConfig)

    @arch("350m")
    def _350m() -> QwenMoEConfig:
        return QwenMoEConfig()

    @arch("small")
    def _small() -> QwenMoEConfig:
        return QwenMoEConfig(
            vocab_size=4_096,
            pad_idx=1,
            model_dim=128,
            num_layers=3,
            num_heads=4,
            num_key_value_heads=4,
            expert_inner_dim=160,
            shared_expert_inner_dim=640,
        )

    @arch("quickstart")
    def _quickstart() -> QwenMoEConfig:
        return QwenMoEConfig(
            vocab_size=2_048,
            pad_idx=1,
            model_dim=96,
            num_layers=4,
            num_heads=4,
            num_key_value_heads=4,
            expert_inner_dim=120,
            shared_expert_inner_dim=464,
        )

    @arch("tiny")
    def _tiny() -> QwenMoEConfig:
        return QwenMoEConfig(
            vocab_size=320,
            max_seq_len=64,
            model_dim=32,
            num_layers=2,
            num_heads=4,
            num_key_value_heads=2,
            num_experts=5,
            expert_inner_dim=24,
            shared_expert_inner_dim=48,
        )
