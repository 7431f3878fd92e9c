"""FSDP, activation checkpointing and compilation of transformers models."""

from __future__ import annotations

from typing import Any, cast

from fairseq2.error import NotSupportedError
from fairseq2.models.utils.ac import apply_layerwise_ac
from fairseq2.models.utils.fsdp import apply_layerwise_fsdp
from fairseq2.nn.fsdp import FSDPWrapper
from torch.nn import Module, ModuleList

from moxe_plugin.models.hf.model import HfCausalLM


def apply_fsdp_to_hf(
    model: HfCausalLM, granularity: str, wrapper: FSDPWrapper
) -> Module:
    """Shard each layer, or everything that transformers computes.

    The stack includes the output projection: tied to the embedding, it has to be
    gathered together with it.

    :param model: The model to shard.
    :param granularity: ``"layer"`` or ``"stack"``.
    :param wrapper: Shards a module.

    :returns: ``model``.

    :raises NotSupportedError: ``granularity`` is neither.
    """
    if granularity == "layer":
        apply_layerwise_fsdp(_layers(model), wrapper)
    elif granularity == "stack":
        model.register_module("hf", wrapper(model.hf))
    else:
        raise NotSupportedError(
            f"`granularity` must be 'layer' or 'stack', but is '{granularity}' instead."
        )

    return model


def apply_ac_to_hf(model: HfCausalLM, every_nth_layer: int) -> Module:
    """Recompute the activations of layers in the backward pass.

    :param model: The model to change.
    :param every_nth_layer: Which layers: every n-th.

    :returns: ``model``.
    """
    apply_layerwise_ac(_layers(model), every_nth_layer)

    return model


def compile_hf(model: HfCausalLM, *args: Any, **kwargs: Any) -> None:
    """Compile each layer in place.

    :param model: The model to compile.
    :param args: Positional arguments of ``torch.compile``.
    :param kwargs: Keyword arguments of ``torch.compile``.
    """
    for layer in _layers(model):
        layer.compile(*args, **kwargs)


def _layers(model: HfCausalLM) -> ModuleList:
    return cast(ModuleList, model.hf.get_submodule("model.layers"))
