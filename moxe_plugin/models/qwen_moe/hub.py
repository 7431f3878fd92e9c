"""Access to Qwen-MoE models by asset name."""

from __future__ import annotations

from fairseq2.models import ModelHubAccessor

from moxe_plugin.models.qwen_moe.config import QWEN_MOE_FAMILY, QwenMoEConfig
from moxe_plugin.models.qwen_moe.model import QwenMoELM

get_qwen_moe_model_hub = ModelHubAccessor(
    QWEN_MOE_FAMILY, kls=QwenMoELM, config_kls=QwenMoEConfig
)
