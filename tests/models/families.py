"""The four families, as tests that hold for all of them see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fairseq2.gang import create_fake_gangs
from fairseq2.models import ModelFamily
from fairseq2.runtime.dependency import get_dependency_resolver
from torch import Tensor

from moxe_plugin.models.clm import AuxLossCausalLM
from moxe_plugin.models.gemma2 import create_gemma2_model
from moxe_plugin.models.qwen_moe import create_qwen_moe_model

FAMILIES = ("moxe", "xlstm", "gemma2", "qwen_moe")

RECURRENT_FAMILIES = ("moxe", "xlstm")


def get_family(name: str) -> ModelFamily:
    """Return a registered family.

    :param name: The name of the family.

    :returns: The family.
    """
    return get_dependency_resolver().resolve(ModelFamily, key=name)


def get_arch(family: str, arch: str) -> Any:
    """Return the configuration of a named architecture.

    :param family: The name of the family.
    :param arch: The name of the architecture.

    :returns: A fresh configuration.
    """
    config = get_family(family).maybe_get_arch_config(arch)
    assert config is not None

    return config


def create_model(
    family: str,
    arch: str = "tiny",
    *,
    change: Callable[[Any], None] | None = None,
    dtype: torch.dtype = torch.float64,
    meta: bool = False,
) -> AuxLossCausalLM:
    """Create a model with fresh parameters.

    :param family: The name of the family.
    :param arch: The name of the architecture.
    :param change: Changes the configuration in place.
    :param dtype: The data type of the parameters.
    :param meta: Whether to create the model on the meta device.

    :returns: The model, in training mode.
    """
    config = get_arch(family, arch)
    if change is not None:
        change(config)

    model = get_family(family).create_new_model(
        config,
        create_fake_gangs(torch.device("cpu")),
        dtype,
        meta=meta,
        init_rank0_only=False,
    )
    assert isinstance(model, AuxLossCausalLM)

    return model


def create_unregistered(family: str, arch: str) -> AuxLossCausalLM:
    """Create a model by its factory alone, on the current device.

    :param family: The name of the family.
    :param arch: The name of the architecture.

    :returns: The model, in training mode.
    """
    factories: dict[str, Callable[[Any], AuxLossCausalLM]] = {
        "gemma2": create_gemma2_model,
        "qwen_moe": create_qwen_moe_model,
    }

    return factories[family](get_arch(family, arch))


def random_ids(*shape: int) -> Tensor:
    """Draw token ids of bytes.

    :param shape: The shape of the result.

    :returns: Token ids.
    """
    return torch.randint(3, 256, shape)
