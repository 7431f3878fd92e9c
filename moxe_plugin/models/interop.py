"""Parameters of the authors' JAX code (github thiomajid/moxe) under our names.

Each of our parameters is made from one or more of theirs. Their names are paths joined
by ``/``, which ours never have; their linear kernels are stored ``(in, out)``, their
head-wise ones ``(heads, out, in)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar, final

import torch
from fairseq2.device import META_DEVICE
from fairseq2.models import ModelFactory, ModelStateDictConverter
from torch import Tensor
from torch.nn import Module

from moxe_plugin.models.exported import strip_export_prefix

_WAY_OUT: Final = (
    "Describe the model that was saved: in an asset card by `model_arch` and "
    "`model_config_overrides`, in a recipe by `model.arch` and "
    "`model.config_overrides`. The architectures of the authors begin with `authors_`."
)

ConfigT = TypeVar("ConfigT")

ModelT = TypeVar("ModelT", bound=Module)


class AuthorsCheckpointError(ValueError):
    """A checkpoint of the authors' code does not fit the model."""


@final
@dataclass(frozen=True)
class AuthorsParameter:
    """Says how one of our parameters is made from theirs."""

    names: tuple[str, ...]
    """Their names."""

    join: Callable[[list[Tensor]], Tensor]
    """Makes ours from theirs."""

    split: Callable[[Tensor], list[Tensor]]
    """Makes theirs from ours."""


def same(name: str) -> AuthorsParameter:
    """Take a parameter as it is.

    :param name: Their name.

    :returns: The correspondence.
    """
    return AuthorsParameter((name,), lambda theirs: theirs[0], lambda ours: [ours])


def transposed(name: str) -> AuthorsParameter:
    """Swap the last two dimensions of a parameter.

    :param name: Their name.

    :returns: The correspondence.
    """
    return AuthorsParameter(
        (name,), lambda theirs: theirs[0].mT, lambda ours: [ours.mT]
    )


def squeezed(name: str, dim: int) -> AuthorsParameter:
    """Drop a dimension of size 1.

    :param name: Their name.
    :param dim: The dimension.

    :returns: The correspondence.
    """
    return AuthorsParameter(
        (name,),
        lambda theirs: theirs[0].squeeze(dim),
        lambda ours: [ours.unsqueeze(dim)],
    )


def stacked_experts(parameters: list[AuthorsParameter]) -> AuthorsParameter:
    """Stack the same parameter of several experts.

    :param parameters: The correspondence for each expert.

    :returns: The correspondence for the stack.
    """
    width = len(parameters[0].names)

    def join(theirs: list[Tensor]) -> Tensor:
        return torch.stack(
            [
                parameter.join(theirs[i * width : (i + 1) * width])
                for i, parameter in enumerate(parameters)
            ]
        )

    def split(ours: Tensor) -> list[Tensor]:
        return [
            tensor
            for parameter, expert in zip(parameters, ours, strict=True)
            for tensor in parameter.split(expert)
        ]

    names = tuple(name for parameter in parameters for name in parameter.names)

    return AuthorsParameter(names, join, split)


def create_authors_converter(
    factory: ModelFactory[ConfigT, ModelT],
    list_parameters: Callable[[ConfigT], Mapping[str, AuthorsParameter]],
) -> ModelStateDictConverter[ConfigT]:
    """Create what fairseq2 applies to every checkpoint of a family that it loads.

    Names tell a checkpoint of theirs from one of ours, which is left as it is, and from
    a model exported for transformers, which gets our names.

    :param factory: Creates a model of the family.
    :param list_parameters: Lists the correspondence for each of its parameters.

    :returns: The converter. It raises :class:`AuthorsCheckpointError`, if names of
        both codes are mixed or :func:`from_authors` does.
    """

    def convert(state_dict: dict[str, object], config: ConfigT) -> dict[str, object]:
        theirs = {name for name in state_dict if "/" in name}

        if not theirs:
            return strip_export_prefix(state_dict)

        if ours := state_dict.keys() - theirs:
            raise AuthorsCheckpointError(
                "A checkpoint must have the names of the authors' code or ours, not "
                f"both, but has {len(theirs)} like '{min(theirs)}' and {len(ours)} "
                f"like '{min(ours)}'."
            )

        with META_DEVICE:
            model = factory(config)

        return {**from_authors(state_dict, list_parameters(config), model.state_dict())}

    return convert


def from_authors(
    theirs: Mapping[str, object],
    parameters: Mapping[str, AuthorsParameter],
    ours: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Convert a state dict of theirs to ours.

    :param theirs: Their parameters by name.
    :param parameters: The correspondence for each of our parameters.
    :param ours: The parameters of a model of ours, for their shapes; they may be on
        the meta device.

    :returns: Our parameters by name.

    :raises AuthorsCheckpointError: A name of theirs is missing or unknown, or what it
        names is not a tensor of the expected shape.
    """
    shapes = {name: tuple(t.shape) for name, t in _split(ours, parameters)}

    _check_names(theirs, shapes, "the authors'")

    tensors = _check_shapes(theirs, shapes)

    return {
        name: parameter.join([tensors[n] for n in parameter.names]).contiguous()
        for name, parameter in parameters.items()
    }


def to_authors(
    ours: Mapping[str, Tensor], parameters: Mapping[str, AuthorsParameter]
) -> dict[str, Tensor]:
    """Convert a state dict of ours to theirs.

    :param ours: Our parameters by name.
    :param parameters: The correspondence for each of our parameters.

    :returns: Their parameters by name.

    :raises AuthorsCheckpointError: A name of ours is missing, or one is unknown.
    """
    _check_names(ours, parameters, "our")

    return {name: tensor.contiguous() for name, tensor in _split(ours, parameters)}


def _split(
    ours: Mapping[str, Tensor], parameters: Mapping[str, AuthorsParameter]
) -> Iterator[tuple[str, Tensor]]:
    for key, parameter in parameters.items():
        yield from zip(parameter.names, parameter.split(ours[key]), strict=True)


def _check_names(found: Iterable[str], expected: Iterable[str], whose: str) -> None:
    found, expected = set(found), set(expected)

    problems = [
        f"'{min(names)}' {problem} ({len(names)} in all)"
        for names, problem in (
            (expected - found, "is missing"),
            (found - expected, "is none of them"),
        )
        if names
    ]

    if problems:
        raise AuthorsCheckpointError(
            f"A checkpoint must have exactly the parameters of {whose} model, but "
            f"{' and '.join(problems)}. {_WAY_OUT}"
        )


def _check_shapes(
    theirs: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    tensors = {}

    for name, shape in shapes.items():
        tensor = theirs[name]

        if not isinstance(tensor, Tensor):
            raise AuthorsCheckpointError(
                f"'{name}' of a checkpoint must be a tensor, but is of type "
                f"`{type(tensor)}` instead."
            )

        if tensor.shape != shape:
            raise AuthorsCheckpointError(
                f"'{name}' of the checkpoint must have the shape {shape} that the "
                f"configuration asks for, but has {tuple(tensor.shape)} instead. "
                f"{_WAY_OUT}"
            )

        tensors[name] = tensor

    return tensors
