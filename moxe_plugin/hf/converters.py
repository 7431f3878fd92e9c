"""Lets fairseq2 write our models for transformers (``regime.export_hugging_face``)."""

from __future__ import annotations

from typing import Any, Final, final

import transformers
from fairseq2.models.hg import HuggingFaceConfig, HuggingFaceConverter
from fairseq2.runtime.dependency import DependencyContainer
from typing_extensions import override

from moxe_plugin.hf.families import HF_FAMILIES, HfFamily

_NO_FIELDS: Final = ("architectures", "model_type", "transformers_version")
"""What fairseq2, or the class itself, sets."""


def register_hf_converters(container: DependencyContainer) -> None:
    """Register a converter for every family.

    :param container: fairseq2's dependency container.
    """
    for name, family in HF_FAMILIES.items():
        container.register_instance(
            HuggingFaceConverter, FamilyConverter(family), key=name
        )


@final
class FamilyConverter(HuggingFaceConverter):
    """Converts the configuration and the parameters of a model.

    :param family: The family of the model.
    """

    def __init__(self, family: HfFamily) -> None:
        self._family = family

    @override
    def to_hg_config(self, config: object) -> HuggingFaceConfig:
        family = self._family

        if not isinstance(config, family.config_kls):
            raise TypeError(
                f"`config` must be of type `{family.config_kls}`, but is of type "
                f"`{type(config)}` instead."
            )

        hf_config_kls = family.hf_config_kls

        # fairseq2 looks the class up in `transformers`, which lacks ours.
        if not family.fields:
            setattr(transformers, hf_config_kls.__name__, hf_config_kls)

        data: dict[str, Any] = family.create_hf_config(config).to_diff_dict()

        data = {name: v for name, v in data.items() if name not in _NO_FIELDS}

        return HuggingFaceConfig(data, hf_config_kls.__name__, family.hf_kls.__name__)

    @override
    def to_hg_state_dict(
        self, state_dict: dict[str, object], config: object
    ) -> dict[str, object]:
        return self._family.export_names(state_dict)
