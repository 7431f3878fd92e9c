"""The names of parameters in models for transformers.

A recurrent model is the attribute ``model`` of its class for transformers; a baseline
has transformers' model as its attribute ``hf``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeVar

EXPORT_PREFIX: Final = "model."
"""What stands before the names of a recurrent family's parameters."""

HF_PREFIX: Final = "hf."
"""What stands before transformers' names in the families made from its modules."""

ValueT = TypeVar("ValueT")


def strip_export_prefix(state_dict: dict[str, object]) -> dict[str, object]:
    """Give exported parameters of a recurrent family their own names.

    :param state_dict: Parameters by name; those of another origin stay as they are.

    :returns: Parameters by the family's names.
    """
    return {n.removeprefix(EXPORT_PREFIX): t for n, t in state_dict.items()}


def convert_hf_state_dict(
    state_dict: dict[str, object],
    config: object,  # noqa: ARG001  # fairseq2 passes it
) -> dict[str, object]:
    """Give exported parameters of a transformers model their names in our families.

    :param state_dict: Parameters by name; those of a checkpoint of ours stay as they
        are.
    :param config: The configuration of the model.

    :returns: Parameters by the family's names.
    """
    return {
        name if name.startswith(HF_PREFIX) else HF_PREFIX + name: tensor
        for name, tensor in state_dict.items()
    }


def add_export_prefix(state_dict: Mapping[str, ValueT]) -> dict[str, ValueT]:
    """Undo :func:`strip_export_prefix`.

    :param state_dict: Values by the family's names.

    :returns: Values by exported names.
    """
    return {EXPORT_PREFIX + name: value for name, value in state_dict.items()}


def strip_hf_prefix(state_dict: Mapping[str, ValueT]) -> dict[str, ValueT]:
    """Undo :func:`convert_hf_state_dict`.

    :param state_dict: Values by the family's names.

    :returns: Values by transformers' names.
    """
    return {name.removeprefix(HF_PREFIX): v for name, v in state_dict.items()}
