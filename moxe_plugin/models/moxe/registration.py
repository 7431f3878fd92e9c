"""Make family `moxe` known to fairseq2."""

from __future__ import annotations

from fairseq2.composition import register_model_family
from fairseq2.runtime.dependency import DependencyContainer

from moxe_plugin.models.interop import create_authors_converter
from moxe_plugin.models.moxe.architectures import register_moxe_configs
from moxe_plugin.models.moxe.config import MOXE_FAMILY, MoxEConfig
from moxe_plugin.models.moxe.factory import create_moxe_model
from moxe_plugin.models.moxe.interop import authors_moxe_parameters
from moxe_plugin.models.moxe.model import MoxELM
from moxe_plugin.models.parallel import (
    apply_ac_to_decoder,
    apply_fsdp_to_decoder,
    compile_decoder,
)


def register_moxe(container: DependencyContainer) -> None:
    """Register the family and its named architectures.

    :param container: fairseq2's dependency container.
    """
    register_model_family(
        container,
        MOXE_FAMILY,
        kls=MoxELM,
        config_kls=MoxEConfig,
        factory=create_moxe_model,
        supports_meta=True,
        restrict=True,
        state_dict_converter=create_authors_converter(
            create_moxe_model, authors_moxe_parameters
        ),
        compiler=compile_decoder,
        fsdp_applier=apply_fsdp_to_decoder,
        layerwise_ac_applier=apply_ac_to_decoder,
    )

    register_moxe_configs(container)
