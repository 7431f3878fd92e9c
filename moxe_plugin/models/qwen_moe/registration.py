"""Make family `qwen_moe` known to fairseq2."""

from __future__ import annotations

from fairseq2.composition import register_model_family
from fairseq2.runtime.dependency import DependencyContainer

from moxe_plugin.models.exported import convert_hf_state_dict
from moxe_plugin.models.hf import apply_ac_to_hf, apply_fsdp_to_hf, compile_hf
from moxe_plugin.models.qwen_moe.config import (
    QWEN_MOE_FAMILY,
    QwenMoEConfig,
    register_qwen_moe_configs,
)
from moxe_plugin.models.qwen_moe.factory import create_qwen_moe_model
from moxe_plugin.models.qwen_moe.model import QwenMoELM


def register_qwen_moe(container: DependencyContainer) -> None:
    """Register the family and its named architectures.

    :param container: fairseq2's dependency container.
    """
    register_model_family(
        container,
        QWEN_MOE_FAMILY,
        kls=QwenMoELM,
        config_kls=QwenMoEConfig,
        factory=create_qwen_moe_model,
        # transformers modules cannot initialise themselves after the meta device.
        supports_meta=False,
        restrict=True,
        state_dict_converter=convert_hf_state_dict,
        compiler=compile_hf,
        fsdp_applier=apply_fsdp_to_hf,
        layerwise_ac_applier=apply_ac_to_hf,
    )

    register_qwen_moe_configs(container)
