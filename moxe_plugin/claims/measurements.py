"""What was measured of a run: one JSON file each, enough to judge without the model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from moxe_plugin.report.files import DamagedRecordError, read_json

SCHEMA_VERSION: Final = 1
"""The version of the files; readers refuse any other."""

_NUM_DIGITS: Final = 7
"""Significant digits that files keep: those of float32."""


@dataclass(frozen=True, kw_only=True)
class RunMeasurement:
    """The content of one file."""

    schema_version: int = SCHEMA_VERSION
    key: str
    """Hash of everything that the numbers depend on."""

    system: str
    """As :func:`~moxe_plugin.claims.systems.name_system` names it."""

    seed: int
    step: int
    """The training step of the checkpoint."""

    model: Mapping[str, Any]
    """``family``, ``config``, ``num_parameters``, ``num_active_parameters``,
    ``forward_flops_per_token`` (useful ones, in a window), and ``num_mlstm_experts``:
    the size of the group, or ``None`` without two groups."""

    setting: Mapping[str, Any]
    """What must be equal for runs to be compared: hashes of training text, tokenizer
    and held-out texts, training tokens, and how the texts were read."""

    training: Mapping[str, Sequence[float]]
    """By published step: ``tokens`` so far, and metrics by fairseq2's names."""

    documents: Mapping[str, Sequence[float]]
    """By document: ``num_tokens``, and in nats ``nll`` and ``unigram_nll``."""

    passages: Mapping[str, Sequence[float]] | None
    """By LAMBADA passage, of its last word: ``num_tokens``, ``is_greedy``, and in nats
    ``nll`` and ``unigram_nll``; ``None`` if there was no such text."""

    layers: Sequence[Mapping[str, Sequence[Any]]]
    """By decoder layer, as :func:`~moxe_plugin.claims.routing_measures.measure_layer`
    returns them, one entry a document each; empty for a model without a router."""

    @property
    def file_name(self) -> str:
        """The name of the file."""
        return f"{self.system}_s{self.seed}.json"


def write_measurement(directory: Path, measurement: RunMeasurement) -> Path:
    """Write one file, in place of an older one of the same system and seed.

    :param directory: Where the file goes.
    :param measurement: The measurement.

    :returns: The file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / measurement.file_name

    # One line a field: tables of thousands of numbers need no line each.
    lines = [
        f"{json.dumps(name)}: {json.dumps(_round(value), sort_keys=True)}"
        for name, value in asdict(measurement).items()
    ]

    part = file.with_name(file.name + ".part")
    part.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    os.replace(part, file)

    return file


def read_measurement(file: Path) -> RunMeasurement:
    """Read one file.

    :param file: The file.

    :returns: The measurement.

    :raises DamagedRecordError: The file is not whole, or of another schema version.
    """
    content = read_json(file)

    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DamagedRecordError(
            f"{file.name}: `schema_version` must be {SCHEMA_VERSION}, but is {version} "
            "instead. Delete the file and measure the run again."
        )

    known = {f.name for f in fields(RunMeasurement)}
    if different := sorted(known ^ content.keys()):
        raise DamagedRecordError(
            f"{file.name}: `{different[0]}` is missing or not known."
        )

    return RunMeasurement(**content)


def read_measurements(directory: Path) -> list[RunMeasurement]:
    """Read all files of a directory and check that their runs can be compared.

    :param directory: The directory.

    :returns: The measurements, sorted by system and seed.

    :raises ValueError: There is none, one is damaged, or two differ in more than what
        is to be compared.
    """
    measurements = [read_measurement(file) for file in sorted(directory.glob("*.json"))]

    if not measurements:
        raise ValueError(
            f"`{directory}` holds no measured run. Name training outputs, and the text "
            "to measure them on with `--text`."
        )

    first = measurements[0]
    configs: dict[str, RunMeasurement] = {}

    for other in measurements:
        for name in sorted(first.setting.keys() | other.setting.keys()):
            expected, value = first.setting.get(name), other.setting.get(name)
            if expected != value:
                raise ValueError(
                    f"{other.file_name} and {first.file_name} do not compare: `{name}` "
                    f"is {value!r} and {expected!r}. Measure them into directories of "
                    "their own with `--out`."
                )

        namesake = configs.setdefault(other.system, other)
        if namesake.model != other.model:
            raise ValueError(
                f"{other.file_name} and {namesake.file_name} have different models "
                "under one name. Measure them into directories of their own with "
                "`--out`."
            )

    return sorted(measurements, key=lambda m: (m.system, m.seed))


def _round(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_NUM_DIGITS}g}")

    if isinstance(value, Mapping):
        return {name: _round(item) for name, item in value.items()}

    if isinstance(value, (list, tuple)):
        return [_round(item) for item in value]

    return value
