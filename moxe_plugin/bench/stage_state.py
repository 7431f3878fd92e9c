"""What the work directory knows of a stage: its configuration, progress and result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from moxe_plugin.report.files import write_json

StageStatus = Literal["running", "done"]


@dataclass(frozen=True, kw_only=True)
class StageState:
    """The state of one stage, kept in ``<run>/<stage>.json``."""

    config_sha256: str
    """Hash of everything that the stage's result depends on."""

    config: Mapping[str, Any]
    """The stage's configuration as resolved."""

    status: StageStatus = "running"
    """``running`` also after a kill: such a stage is continued."""

    elapsed_s: float = 0.0
    """Seconds over all attempts."""

    result: Mapping[str, Any] = field(default_factory=dict)
    """What the stage found out, once it is done."""


def read_state(file: Path) -> StageState | None:
    """Read the state of a stage.

    :param file: The file; it need not exist.

    :returns: The state, or ``None`` if the stage never started.
    """
    if not file.exists():
        return None

    # Not strict: a NaN loss is for the tables to report.
    return StageState(**json.loads(file.read_text(encoding="utf-8")))


def write_state(file: Path, state: StageState) -> None:
    """Write the state of a stage.

    :param file: The file.
    :param state: The state.
    """
    file.parent.mkdir(parents=True, exist_ok=True)

    write_json(file, asdict(state))


def hash_config(config: object) -> str:
    """Hash plain values, whatever the order of their keys.

    :param config: Plain values.

    :returns: A digest in hexadecimal.
    """
    text = json.dumps(config, sort_keys=True, default=str)

    return hashlib.sha256(text.encode()).hexdigest()


def list_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say how two configurations differ.

    :param old: The earlier one.
    :param new: The later one.

    :returns: Lines such as ``regime.num_steps: 10 -> 20``, sorted.
    """
    before, after = dict(_flatten(old)), dict(_flatten(new))

    return [
        f"{key}: {before.get(key, 'nothing')} -> {after.get(key, 'nothing')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
