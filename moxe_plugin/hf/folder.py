"""Reads the folder of an exported model, without running anything that is in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from moxe_plugin.hf.families import (
    HF_FAMILIES,
    list_parameters,
    read_hf_config,
    unstructure,
)

CONFIG_FILE: Final = "config.json"


class ExportedModel(NamedTuple):
    """A model in a folder for transformers."""

    dir: Path
    """The folder; fairseq2 takes it as a checkpoint."""

    family: str
    """The name of the family."""

    model_config: Mapping[str, Any]
    """All fields of the family's configuration."""


def is_exported(path: Path) -> bool:
    """Tell the folder of an exported model from other directories.

    :param path: The directory.

    :returns: Whether it holds a ``config.json``.
    """
    return (path / CONFIG_FILE).is_file()


def open_exported(path: Path) -> ExportedModel:
    """Read and check the folder of an exported model.

    :param path: The folder.

    :returns: The model. Its parameters were not read, but exactly those that the
        configuration asks for are there.

    :raises ValueError: The configuration is damaged or belongs to no family of this
        package, or a parameter is missing, unknown or of another shape.
    """
    path = path.resolve()

    hf_config = _read_config(path / CONFIG_FILE)

    try:
        family, config = read_hf_config(hf_config)
    except ValueError as ex:
        raise ValueError(f"'{path / CONFIG_FILE}' cannot be used: {ex}") from ex

    _check_parameters(path, _read_shapes(path), list_parameters(family, config))

    return ExportedModel(path, family, unstructure(config))


def _read_config(file: Path) -> PretrainedConfig:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as ex:
        raise ValueError(f"'{file}' is not valid JSON: {ex}") from ex

    if not isinstance(values, dict):
        raise ValueError(f"'{file}' must hold a JSON object.")

    kinds = {f.hf_config_kls.model_type: f.hf_config_kls for f in HF_FAMILIES.values()}

    if (kind := values.get("model_type")) not in kinds:
        raise ValueError(
            f"`model_type` in '{file}' must be one of {', '.join(kinds)}, but is "
            f"{kind!r} instead."
        )

    # The class comes from here, never from what the file names in `auto_map`.
    return kinds[kind].from_dict(values)


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    files = sorted(path.glob("*.safetensors"))

    if not files:
        raise ValueError(
            f"'{path}' must hold the parameters in safetensors files, but has none. "
            "Other formats are not read."
        )

    shapes: dict[str, tuple[int, ...]] = {}

    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                    if name in shapes:
                        raise ValueError(f"'{path}' has '{name}' in two files.")

                    shapes[name] = tuple(tensors.get_slice(name).get_shape())
        except SafetensorError as ex:
            raise ValueError(f"'{file}' is not a safetensors file: {ex}") from ex

    return shapes


def _check_parameters(
    path: Path,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    common = found.keys() & expected.keys()

    problems = [
        f"{_list(names)} {problem}"
        for names, problem in (
            (expected.keys() - found.keys(), "missing"),
            (found.keys() - expected.keys(), "unknown"),
        )
        if names
    ]

    problems += [
        f"'{name}' of shape {found[name]} instead of {expected[name]}"
        for name in sorted(common)
        if found[name] != expected[name]
    ]

    if problems:
        raise ValueError(
            f"'{path}' must have exactly the parameters that its {CONFIG_FILE} asks "
            f"for, but has {'; '.join(problems[:3])}."
        )


def _list(names: set[str]) -> str:
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""

    return f"'{min(names)}'{rest}"
