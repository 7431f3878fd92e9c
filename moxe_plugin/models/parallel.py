"""What families do under tensor parallelism, FSDP, checkpointing and compilation."""

from __future__ import annotations

from typing import Any, Protocol, cast

from fairseq2.error import NotSupportedError
from fairseq2.gang import get_current_gangs
from fairseq2.models.utils.ac import apply_layerwise_ac
from fairseq2.models.utils.fsdp import apply_layerwise_fsdp
from fairseq2.nn.fsdp import FSDPWrapper
from torch.nn import Module, ModuleList


class _Decoder(Protocol):
    layers: ModuleList


def check_no_tensor_parallelism(family: str) -> None:
    """Check that the current gangs do not split a model.

    A family that ignored them would silently train replicas.

    :param family: The name of the family of the model.

    :raises NotSupportedError: Tensor parallelism is on.
    """
    tp_size = get_current_gangs().tp.size

    if tp_size > 1:
        raise NotSupportedError(
            f"`gang.tensor_parallel_size` must be 1 for family '{family}', which has "
            f"no tensor parallelism yet, but is {tp_size} instead."
        )


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
