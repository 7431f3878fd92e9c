"""What commands show while they work, and what they print for programs."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from moxe_plugin.console import Stages, print_json


def _run_stage(
    stages: Stages, monkeypatch: pytest.MonkeyPatch, num_items: int, total: int | None
) -> None:
    """Go through items, each of which takes four seconds."""
    now = 100.0

    monkeypatch.setattr("moxe_plugin.console.time.monotonic", lambda: now)

    with stages, stages.start("Counting [x]", total) as stage:
        for item in stage.over(range(num_items)):
            assert item < num_items
            now += 4.0


def test_without_terminal_lines_come_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sink = io.StringIO()

    _run_stage(Stages(console=Console(file=sink)), monkeypatch, 9, 10)

    assert sink.getvalue().splitlines() == [
        "Counting [x]: 4/10, 16 s, about 24 s left",
        "Counting [x]: 8/10, 32 s, about 8 s left",
    ]


def test_without_total_nothing_is_foretold(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = io.StringIO()

    _run_stage(Stages(console=Console(file=sink)), monkeypatch, 4, None)

    assert sink.getvalue() == "Counting [x]: 4, 16 s\n"


def test_short_work_is_silent_without_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = io.StringIO()

    _run_stage(Stages(console=Console(file=sink)), monkeypatch, 3, 3)

    assert sink.getvalue() == ""


@pytest.mark.parametrize("is_timing", [False, True])
def test_terminal_gets_a_bar_with_the_time_left(is_timing: bool) -> None:
    sink = io.StringIO()
    console = Console(file=sink, force_terminal=True, width=100)

    with (
        Stages(is_timing=is_timing, console=console) as stages,
        stages.start("Counting [x]", 2) as stage,
    ):
        assert list(stage.over("ab")) == ["a", "b"]
        stages.show("a [message]")

    assert "Counting [x]" in sink.getvalue()
    assert "2/2" in sink.getvalue()
    assert "left:" in sink.getvalue()
    assert "a [message]" in sink.getvalue()


def test_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": Path("b/c"), "n": [1.5, math.nan, {"m": (math.inf, "é")}]})

    out = capsys.readouterr().out

    assert json.loads(out) == {"a": "b/c", "n": [1.5, None, {"m": [None, "é"]}]}
    assert "é" in out
