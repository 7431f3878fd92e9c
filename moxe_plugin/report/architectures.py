"""What `moxe systems` found out about architectures: the files of its tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pandas as pd

from moxe_plugin.report.files import DamagedRecordError
from moxe_plugin.report.records import DamagedRun

_PREFIX: Final = "systems_"

_COLUMNS: Final = (
    "label",
    "family",
    "arch",
    "expert_state",
    "paper_parameters",
    "num_parameters",
    "num_active_parameters",
    "num_effective_parameters",
    "flops_per_token",
    "context_len",
)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Size and cost of an architecture."""

    size: str
    """Which file it is from: ``systems_<size>.csv``."""

    label: str
    family: str
    arch: str
    expert_state: str | None
    """What its xLSTM experts remember; ``None`` if it has none."""

    paper_parameters: str | None
    """The number of parameters as the paper prints it."""

    num_parameters: int
    num_active_parameters: int
    num_effective_parameters: int
    """Parameters that can receive a gradient."""

    flops_per_token: float
    """Useful FLOPs of a forward pass."""

    context_len: int
    """The length of the sequence that FLOPs are counted at."""


def read_architectures(
    tables_dir: Path,
) -> tuple[list[Architecture], list[DamagedRun]]:
    """Read all tables of `moxe systems`.

    :param tables_dir: The directory of ``systems_<size>.csv`` files.

    :returns: The architectures, and the files that give none with the reason.
    """
    architectures, damaged = [], []

    for file in sorted(tables_dir.glob(f"{_PREFIX}*.csv")):
        try:
            architectures += _read_file(file)
        except DamagedRecordError as ex:
            damaged.append(DamagedRun(name=file.name, reason=str(ex)))

    return architectures, damaged


def find_architecture(
    architectures: Sequence[Architecture], family: str, arch: str
) -> Architecture | None:
    """Find an architecture by the names that a run records.

    :param architectures: Where to search.
    :param family: The model family.
    :param arch: The architecture's name in it.

    :returns: The architecture, if it is there.
    """
    for architecture in architectures:
        if (architecture.family, architecture.arch) == (family, arch):
            return architecture

    return None


def _read_file(file: Path) -> list[Architecture]:
    try:
        frame = pd.read_csv(file, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as ex:
        raise DamagedRecordError(f"not valid CSV ({ex}).") from None

    if tuple(frame.columns) != _COLUMNS:
        raise DamagedRecordError(f"its columns must be {', '.join(_COLUMNS)}.")

    size = file.stem.removeprefix(_PREFIX)

    try:
        return [
            Architecture(
                size=size,
                label=line["label"],
                family=line["family"],
                arch=line["arch"],
                expert_state=line["expert_state"] or None,
                paper_parameters=line["paper_parameters"] or None,
                num_parameters=int(line["num_parameters"]),
                num_active_parameters=int(line["num_active_parameters"]),
                num_effective_parameters=int(line["num_effective_parameters"]),
                flops_per_token=float(line["flops_per_token"]),
                context_len=int(line["context_len"]),
            )
            for line in frame.to_dict("records")
        ]
    except ValueError as ex:
        raise DamagedRecordError(f"a number is none ({ex}).") from None
