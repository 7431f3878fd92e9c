"""Make family `xlstm` known to fairseq2."""

from __future__ import annotations

from fairseq2.composition import register_model_family
from fairseq2.runtime.dependency import DependencyContainer

from moxe_plugin.models.interop import create_authors_converter
from moxe_plugin.models.parallel import (
    apply_ac_to_decoder,
    apply_fsdp_to_decoder,
    compile_decoder,
)
from moxe_plugin.models.xlstm.config import (
    XLSTM_FAMILY,
    XLSTMConfig,
    register_xlstm_configs,
)
from moxe_plugin.models.xlstm.factory import create_xlstm_model
from moxe_plugin.models.xlstm.interop import authors_xlstm_parameters
from moxe_plugin.models.xlstm.model import XLSTMLM


def register_xlstm(container: DependencyContainer) -> None:
    """Register the family and its named architectures.

    :param container: fairseq2's dependency container.
    """
    register_model_family(
        container,
        XLSTM_FAMILY,
        kls=XLSTMLM,
        config_kls=XLSTMConfig,
        factory=create_xlstm_model,
        supports_meta=True,
        restrict=True,
        state_dict_converter=create_authors_converter(
            create_xlstm_model, authors_xlstm_parameters
        ),
        compiler=compile_decoder,
        fsdp_applier=apply_fsdp_to_decoder,
        layerwise_ac_applier=apply_ac_to_decoder,
    )

    register_xlstm_configs(container)
