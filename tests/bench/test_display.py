"""What a suite shows while it runs."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from moxe_plugin.bench.display import LineDisplay, open_display
from moxe_plugin.bench.plan import StagePlan
from moxe_plugin.bench.progress import StageProgress, read_progress


def _stage(run_dir: Path, **config: object) -> StagePlan:
    return StagePlan(
        name="pretrain", run_dir=run_dir, config=config, config_sha256="hash"
    )


def test_training_progress_comes_from_the_metrics(tmp_path: Path) -> None:
    stage = _stage(tmp_path, regime={"num_steps": 40})
    log_file = tmp_path / "pretrain.log"

    assert read_progress(stage, log_file) == (0.0, "step 0/40")

    file = stage.output_dir / "metrics" / "train.jsonl"
    file.parent.mkdir(parents=True)
    line = {"Step": 10, "NLL Loss": 6.12345, "Elements per Second": 1234.5}
    file.write_text(json.dumps(line) + "\n")

    assert read_progress(stage, log_file) == (
        0.25,
        "step 10/40, loss 6.123, 1,234 tokens/s",
    )


def test_other_progress_comes_from_the_last_bar_in_the_log(tmp_path: Path) -> None:
    stage, log_file = _stage(tmp_path), tmp_path / "evaluate.log"

    assert read_progress(stage, log_file) == (None, "")

    log_file.write_text("Running:  10%|#    |\rRunning:  34%|###  |")

    assert read_progress(stage, log_file) == (0.34, "")


def test_lines_are_rare_and_estimate_the_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)

    output = io.StringIO()
    lines = LineDisplay(Console(file=output))

    step = lines.start_step("work")
    for now in (101.0, 109.0, 110.0, 119.0):
        step.update(StageProgress((now - 100) / 100, f"at {now:.0f}"))
    step.finish(19.0)

    assert output.getvalue().splitlines() == [
        "work ...",
        "work: at 109, 9 s, about 91 s left",
        "work: at 119, 19 s, about 81 s left",
        "work: done in 19 s",
    ]


def test_terminal_gets_bars() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=100)

    with open_display(console) as bars:
        bars.expect([])
        step = bars.start_step("[1/2] work")
        step.update(StageProgress(0.5, "step 1/2"))
        step.finish(1.0)

    assert "[1/2] work: done in 1 s" in output.getvalue()
