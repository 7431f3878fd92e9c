"""A `moxe bench` with fake stages that kills its whole process group at some points.

``python -m tests.bench.killed_bench ARGUMENT...`` dies at the first point that it comes
to and has not died at before. It runs to the end when it has died at all of them.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from moxe_plugin.bench import __main__, runner, stages
from moxe_plugin.bench.plan import StagePlan
from moxe_plugin.report import run_dirs
from tests.bench import fake_stages

PARENT_POINTS: Final[dict[str, tuple[Any, str, str]]] = {
    "stage-begun": (runner, "write_state", r"moxe_s2/pretrain\.json"),
    "stage-done": (runner, "write_state", r"moxe_s2/pretrain\.json.*'done'"),
    "record-file": (run_dirs, "write_items", r"\.moxe_"),
    "record-files": (run_dirs, "_write_files", r"\.moxe_"),
    "recorded": (runner, "record_run", "moxe_s2"),
}
"""Functions after whose first call with matching arguments everything is killed."""

CHILD_POINTS: Final = ("pretrain", "evaluate")
"""Stages that are killed with everything else when they have done their work."""


def kill_everything() -> None:
    os.killpg(os.getpgrp(), signal.SIGKILL)


def train(stage: StagePlan) -> dict[str, Any]:
    result = fake_stages.train(stage)
    _kill_once(stage)

    return result


def evaluate(stage: StagePlan) -> dict[str, Any]:
    result = fake_stages.evaluate(stage)
    _kill_once(stage)

    return result


def _kill_once(stage: StagePlan) -> None:
    marker = stage.run_dir / f"{stage.name}.killed"

    if not marker.exists() and stage.name in CHILD_POINTS:
        marker.touch()
        kill_everything()


def _die_after(module: Any, name: str, pattern: str, marker: Path) -> None:
    function: Callable[..., Any] = getattr(module, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        is_due = not marker.exists() and re.search(pattern, repr(args), re.DOTALL)

        result = function(*args, **kwargs)

        if is_due:
            marker.touch()
            kill_everything()

        return result

    setattr(module, name, call)


def main(argv: list[str]) -> int:
    for point, (module, name, pattern) in PARENT_POINTS.items():
        marker = Path(argv[0]).with_name(f"{point}.killed")
        _die_after(module, name, pattern, marker)

    replacements: dict[str, Any] = {
        "PRELOAD": ("moxe_plugin.bench.children", "tests.bench.fake_stages"),
        "resolve_suite": fake_stages.resolve,
        "STAGE_FUNCTIONS": {
            "pretrain": train,
            "finetune": train,
            "evaluate": evaluate,
            "guess": fake_stages.guess,
        },
    }
    for name, value in replacements.items():
        setattr(stages, name, value)

    # Tables are written from whole records, and take longer than all else here.
    __main__._report = lambda *_: 0

    return __main__.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
