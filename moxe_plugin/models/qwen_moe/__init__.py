"""Model family `qwen_moe`: a transformer of experts, one of MoxE's baselines."""

from moxe_plugin.models.qwen_moe.config import QWEN_MOE_FAMILY as QWEN_MOE_FAMILY
from moxe_plugin.models.qwen_moe.config import QwenMoEConfig as QwenMoEConfig
from moxe_plugin.models.qwen_moe.factory import QwenMoEFactory as QwenMoEFactory
from moxe_plugin.models.qwen_moe.factory import (
    create_qwen_moe_model as create_qwen_moe_model,
)
from moxe_plugin.models.qwen_moe.hub import (
    get_qwen_moe_model_hub as get_qwen_moe_model_hub,
)
from moxe_plugin.models.qwen_moe.model import QwenMoELM as QwenMoELM
from moxe_plugin.models.qwen_moe.registration import (
    register_qwen_moe as register_qwen_moe,
)
