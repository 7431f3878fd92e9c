"""Make family `gemma2` known to fairseq2."""

from __future__ import annotations

from fairseq2.composition import register_model_family
from fairseq2.runtime.dependency import DependencyContainer

from moxe_plugin.models.exported import convert_hf_state_dict
from moxe_plugin.models.gemma2.config import (
    GEMMA2_FAMILY,
    Gemma2Config,
    register_gemma2_configs,
)
from moxe_plugin.models.gemma2.factory import create_gemma2_model
from moxe_plugin.models.gemma2.model import Gemma2LM
from moxe_plugin.models.hf import apply_ac_to_hf, apply_fsdp_to_hf, compile_hf


def register_gemma2(container: DependencyContainer) -> None:
    """Register the family and its named architectures.

    :param container: fairseq2's dependency container.
    """
    register_model_family(
        container,
        GEMMA2_FAMILY,
        kls=Gemma2LM,
        config_kls=Gemma2Config,
        factory=create_gemma2_model,
        # transformers modules cannot initialise themselves after the meta device.
        supports_meta=False,
        restrict=True,
        state_dict_converter=convert_hf_state_dict,
        compiler=compile_hf,
        fsdp_applier=apply_fsdp_to_hf,
        layerwise_ac_applier=apply_ac_to_hf,
    )

    register_gemma2_configs(container)
