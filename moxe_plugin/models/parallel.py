"""FSDP, activation checkpointing and compilation of a model with decoder layers."""

from __future__ import annotations

from typing import Any, Protocol, cast

from fairseq2.error import NotSupportedError
from fairseq2.models.utils.ac import apply_layerwise_ac
from fairseq2.models.utils.fsdp import apply_layerwise_fsdp
from fairseq2.nn.fsdp import FSDPWrapper
from torch.nn import Module, ModuleList


class _Decoder(Protocol):
    layers: ModuleList


def apply_fsdp_to_decoder(
    model: Module, granularity: str, wrapper: FSDPWrapper
) -> Module:
    """Shard each layer, or the whole stack of layers.

    :param model: A model with ``decoder.layers``.
    :param granularity: ``"layer"`` or ``"stack"``.
    :param wrapper: Shards a module.

    :returns: ``model``.

    :raises NotSupportedError: ``granularity`` is neither.
    """
    decoder = cast(Module, model.decoder)

    if granularity == "layer":
        apply_layerwise_fsdp(cast(_Decoder, decoder).layers, wrapper)
    elif granularity == "stack":
        model.register_module("decoder", wrapper(decoder))
    else:
        raise NotSupportedError(
            f"`granularity` must be 'layer' or 'stack', but is '{granularity}' instead."
        )

    return model


def apply_ac_to_decoder(model: Module, every_nth_layer: int) -> Module:
    """Recompute the activations of layers in the backward pass.

    :param model: A model with ``decoder.layers``.
    :param every_nth_layer: Which layers: every n-th.

    :returns: ``model``.
    """
    apply_layerwise_ac(cast(_Decoder, model.decoder).layers, every_nth_layer)

    return model


def compile_decoder(model: Module, *args: Any, **kwargs: Any) -> None:
    """Compile each layer in place.

    :param model: A model with ``decoder.layers``.
    :param args: Positional arguments of ``torch.compile``.
    :param kwargs: Keyword arguments of ``torch.compile``.
    """
    for layer in cast(_Decoder, model.decoder).layers:
        layer.compile(*args, **kwargs)
