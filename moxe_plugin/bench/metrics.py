"""What a training stage wrote while it ran, and its sums."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

_STEP: Final = "Step"
_TOKENS: Final = "Number of Target Elements"
_TOTAL_TOKENS: Final = "Total Number of Target Elements"
_SECONDS: Final = ("Data Time", "Compute Time")


class TrainingSums(NamedTuple):
    """Sums over the steps of a training stage."""

    num_tokens: int | None
    """Target tokens."""

    tokens_per_s: float | None
    """Target tokens over the time of reading data and computing."""


def read_train_metrics(output_dir: Path, stage: str) -> list[dict[str, Any]]:
    """Read the training metrics of a stage.

    :param output_dir: The stage's output directory.
    :param stage: Stored with each line as ``Stage``.

    :returns: One entry a step that was published, in order of steps.
    """
    return _read(output_dir / "metrics" / "train.jsonl", {"Stage": stage})


def read_valid_metrics(output_dir: Path, stage: str) -> list[dict[str, Any]]:
    """Read the validation metrics of a stage.

    :param output_dir: The stage's output directory.
    :param stage: Stored with each line as ``Stage``.

    :returns: The entries of all validation splits, each named by ``Split``.
    """
    metrics_dir = output_dir / "metrics"

    return [
        line
        for file in sorted(metrics_dir.glob("valid*.jsonl"))
        + sorted(metrics_dir.glob("valid/**/*.jsonl"))
        for line in _read(file, {"Stage": stage, "Split": file.stem})
    ]


def read_last_train_metrics(output_dir: Path) -> Mapping[str, Any]:
    """Read the newest training metrics of a stage, for a progress display.

    :param output_dir: The stage's output directory.

    :returns: The last complete line, or nothing if there is none yet.
    """
    file = output_dir / "metrics" / "train.jsonl"
    if not file.exists():
        return {}

    # Only whole lines end with a line break.
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]

    return _parse(lines[-1]) if lines else {}


def sum_up(lines: Sequence[Mapping[str, Any]]) -> TrainingSums:
    """Sum up the training metrics of a stage.

    :param lines: As :func:`read_train_metrics` returns them.

    :returns: The sums; ``None`` where the metrics do not tell.
    """
    totals = [line[_TOTAL_TOKENS] for line in lines if _TOTAL_TOKENS in line]

    timed = [line for line in lines if _TOKENS in line and _SECONDS[1] in line]
    seconds = sum(line.get(name, 0.0) for line in timed for name in _SECONDS)
    tokens = sum(line[_TOKENS] for line in timed)

    return TrainingSums(
        int(totals[-1]) if totals else None, tokens / seconds if seconds > 0 else None
    )


def _read(file: Path, labels: Mapping[str, str]) -> list[dict[str, Any]]:
    if not file.exists():
        return []

    by_step: dict[int, dict[str, Any]] = {}

    for line in file.read_text(encoding="utf-8").splitlines():
        entry = _parse(line)

        # A continued run repeats the steps after its last checkpoint.
        for step in [s for s in by_step if s >= entry[_STEP]]:
            del by_step[step]

        by_step[entry[_STEP]] = {**labels, **entry}

    return list(by_step.values())


def _parse(line: str) -> dict[str, Any]:
    # A kill may have cut a line short, to which the next attempt appended; entries
    # hold no objects, so the last one begins at the last brace.
    entry: dict[str, Any] = json.loads(line[line.rindex("{") :])

    return entry
