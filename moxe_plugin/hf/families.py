"""The families as models of transformers: their configurations and parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

from fairseq2.device import META_DEVICE
from fairseq2.utils.structured import StandardValueConverter, StructureError
from fairseq2.utils.validation import StandardObjectValidator, ValidationError
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from moxe_plugin.hf.config import MoxEConfig, RecurrentConfig, XLSTMConfig
from moxe_plugin.hf.model import MoxEForCausalLM, XLSTMForCausalLM
from moxe_plugin.models import gemma2, moxe, qwen_moe, xlstm
from moxe_plugin.models.clm import AuxLossCausalLM
from moxe_plugin.models.exported import add_export_prefix, strip_hf_prefix
from moxe_plugin.models.gemma2.factory import Gemma2Factory
from moxe_plugin.models.qwen_moe.factory import QwenMoEFactory


class HfFamily(NamedTuple):
    """A family, and what it is in transformers."""

    config_kls: type[Any]
    """The configuration class of the family."""

    create_model: Callable[[Any], AuxLossCausalLM]
    """Creates a model of the family."""

    hf_config_kls: type[PretrainedConfig]
    """The configuration class in transformers' form."""

    hf_kls: type[PreTrainedModel]
    """The model class in transformers' form."""

    create_hf_config: Callable[[Any], PretrainedConfig]
    """Translates a configuration of the family."""

    fields: Mapping[str, str]
    """For a class of transformers itself: its names of the family's fields."""

    def export_names(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Give values their names in transformers.

        :param state_dict: Values by the family's names.

        :returns: Values by transformers' names, without tied parameters.
        """
        if not self.fields:
            return add_export_prefix(state_dict)

        exported = strip_hf_prefix(state_dict)

        if self.hf_config_kls().tie_word_embeddings:
            del exported["lm_head.weight"]

        return exported


_ATTENTION_FIELDS: Final = {
    "vocab_size": "vocab_size",
    "pad_idx": "pad_token_id",
    "max_seq_len": "max_position_embeddings",
    "model_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
}

_GEMMA2_FIELDS: Final = {
    **_ATTENTION_FIELDS,
    "head_dim": "head_dim",
    "ffn_inner_dim": "intermediate_size",
    "sliding_window": "sliding_window",
}

_QWEN_MOE_FIELDS: Final = {
    **_ATTENTION_FIELDS,
    "num_experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "expert_inner_dim": "moe_intermediate_size",
    "shared_expert_inner_dim": "shared_expert_intermediate_size",
    "load_balance_loss_scale": "router_aux_loss_coef",
}


def unstructure(config: object) -> dict[str, Any]:
    """Turn a configuration into plain values.

    :param config: The configuration of a family.

    :returns: All its fields.
    """
    values = StandardValueConverter().unstructure(config)
    assert isinstance(values, dict)

    return values


def _create_qwen_moe_config(config: Any) -> PretrainedConfig:
    hf_config = QwenMoEFactory(config).create_hf_config()
    # Only our own losses and statistics need them.
    hf_config.output_router_logits = False

    return hf_config


HF_FAMILIES: Final[Mapping[str, HfFamily]] = {
    moxe.MOXE_FAMILY: HfFamily(
        moxe.MoxEConfig,
        moxe.create_moxe_model,
        MoxEConfig,
        MoxEForCausalLM,
        lambda config: MoxEConfig(unstructure(config)),
        {},
    ),
    xlstm.XLSTM_FAMILY: HfFamily(
        xlstm.XLSTMConfig,
        xlstm.create_xlstm_model,
        XLSTMConfig,
        XLSTMForCausalLM,
        lambda config: XLSTMConfig(unstructure(config)),
        {},
    ),
    gemma2.GEMMA2_FAMILY: HfFamily(
        gemma2.Gemma2Config,
        gemma2.create_gemma2_model,
        Gemma2Config,
        Gemma2ForCausalLM,
        lambda config: Gemma2Factory(config).create_hf_config(),
        _GEMMA2_FIELDS,
    ),
    qwen_moe.QWEN_MOE_FAMILY: HfFamily(
        qwen_moe.QwenMoEConfig,
        qwen_moe.create_qwen_moe_model,
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        _create_qwen_moe_config,
        _QWEN_MOE_FIELDS,
    ),
}
"""What can be exported, by the name of the family."""


def structure_family_config(family: str, values: Mapping[str, Any]) -> Any:
    """Create and check the configuration of a family.

    :param family: The name of the family.
    :param values: The fields that differ from the default values.

    :returns: An object of the family's configuration class.

    :raises ValueError: A field is unknown or has a wrong value.
    """
    try:
        config = StandardValueConverter().structure(
            values, HF_FAMILIES[family].config_kls
        )

        StandardObjectValidator().validate(config)
    except (StructureError, ValidationError) as ex:
        reasons = " ".join(str(cause) for cause in _causes(ex))

        raise ValueError(
            f"`model_config` must be a configuration of family '{family}', but is not: "
            f"{reasons}"
        ) from ex

    return config


def _causes(ex: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = ex

    while cause is not None:
        yield cause

        cause = cause.__cause__


def create_family_model(family: str, config: Any) -> AuxLossCausalLM:
    """Create a model of a family.

    :param family: The name of the family.
    :param config: Its configuration.

    :returns: The model, on torch's current device and of its default type.
    """
    return HF_FAMILIES[family].create_model(config)


def read_hf_config(hf_config: PretrainedConfig) -> tuple[str, Any]:
    """Find out which model of ours a configuration of transformers describes.

    :param hf_config: The configuration.

    :returns: The name of the family, and its configuration.

    :raises ValueError: It describes no model of ours.
    """
    if isinstance(hf_config, RecurrentConfig):
        return hf_config.family, hf_config.create_family_config()

    families = {f.hf_config_kls: name for name, f in HF_FAMILIES.items()}

    family = families.get(type(hf_config))
    if family is None:
        raise ValueError(f"`{type(hf_config)}` belongs to no family of this package.")

    hf_family = HF_FAMILIES[family]

    values = {o: getattr(hf_config, theirs) for o, theirs in hf_family.fields.items()}

    config = structure_family_config(family, values)

    # Whatever is no field of ours must be as our family has it.
    found, ours = _describe(hf_config), _describe(hf_family.create_hf_config(config))

    for name in sorted(found.keys() | ours.keys()):
        if found.get(name) != ours.get(name):
            raise ValueError(
                f"`{name}` must be {ours.get(name)!r} in family '{family}', but is "
                f"{found.get(name)!r} instead."
            )

    return family, config


_FREE: Final = (
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "output_router_logits",
    "transformers_version",
    "use_cache",
)
"""What changes no logits."""


def _describe(hf_config: PretrainedConfig) -> dict[str, Any]:
    values = hf_config.to_dict()

    # Names that begin so are transformers' own notes.
    return {n: v for n, v in values.items() if n not in _FREE and n[0] != "_"}


def list_parameters(family: str, config: Any) -> dict[str, tuple[int, ...]]:
    """List the parameters of an exported model.

    :param family: The name of the family.
    :param config: Its configuration.

    :returns: The shapes of the parameters by their exported names.
    """
    with META_DEVICE:
        model = create_family_model(family, config)

    exported = HF_FAMILIES[family].export_names(model.state_dict())

    return {name: tuple(tensor.shape) for name, tensor in exported.items()}
