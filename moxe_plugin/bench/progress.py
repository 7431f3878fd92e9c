"""Finds out how far a stage is, from what its process writes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from moxe_plugin.bench.metrics import read_last_train_metrics
from moxe_plugin.bench.plan import StagePlan

_PERCENT: Final = re.compile(r"(\d+)%\|")
"""How tqdm writes a percentage."""

_LOG_TAIL_BYTES: Final = 4096


class StageProgress(NamedTuple):
    """How far a stage is."""

    fraction: float | None = None
    """In [0, 1], if known."""

    details: str = ""
    """For example ``step 20/110, loss 6.123``."""


def read_progress(stage: StagePlan, log_file: Path) -> StageProgress:
    """Find out how far a stage is, from what it writes.

    :param stage: The stage.
    :param log_file: What its process prints.

    :returns: The progress.
    """
    if stage.num_steps is not None:
        return _training_progress(
            stage.num_steps, read_last_train_metrics(stage.output_dir)
        )

    if not log_file.exists():
        return StageProgress()

    with log_file.open("rb") as file:
        file.seek(max(0, log_file.stat().st_size - _LOG_TAIL_BYTES))
        tail = file.read().decode(errors="replace")

    percentages = _PERCENT.findall(tail)

    return StageProgress(int(percentages[-1]) / 100 if percentages else None)


def _training_progress(num_steps: int, metrics: Mapping[str, Any]) -> StageProgress:
    step = metrics.get("Step", 0)

    details = f"step {step}/{num_steps}"
    if "NLL Loss" in metrics:
        details += f", loss {metrics['NLL Loss']:.3f}"
    if "Elements per Second" in metrics:
        details += f", {metrics['Elements per Second']:,.0f} tokens/s"

    return StageProgress(step / num_steps, details)
