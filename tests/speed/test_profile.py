"""The profile of a training step."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from moxe_plugin.report.files import read_json
from moxe_plugin.speed import profile
from moxe_plugin.speed.profile import list_calls, time_steps

CPU = torch.device("cpu")


def test_a_profile_tells_what_ran(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--size tiny --device cpu --dtype float32 --batch 2 --length 8"
    options += " --repeats 2 --warm-up 0 --top 3 --name mine --out"

    assert profile.main([*options.split(), str(tmp_path)]) == 0

    measured = read_json(tmp_path / "mine.json")
    assert measured["arch"] == "tiny"
    assert measured["device"]
    assert len(measured["times"]["steps"]) == len(measured["times"]["host"]) == 2
    assert 0 < measured["host_ms"] <= measured["step_ms"]
    assert measured["tokens_per_s"] == pytest.approx(16e3 / measured["step_ms"])
    times = [x["milliseconds"] for x in measured["calls"]]
    assert times == sorted(times, reverse=True)
    assert measured["busy_ms"] == pytest.approx(sum(times))
    assert any(x["name"] == "aten::embedding" for x in measured["calls"])

    page = (tmp_path / "mine.md").read_text("utf-8")
    assert capsys.readouterr().out == page
    # Three rows, the heading, and the line below it
    assert page.count("\n|") == 5


def test_calls_are_counted_without_those_in_them() -> None:
    lhs = torch.ones(64, 64)

    calls = {x.name: x for x in list_calls(lambda: (lhs @ lhs, lhs @ lhs), CPU)}

    assert calls["aten::mm"].num_calls == calls["aten::matmul"].num_calls == 2
    assert calls["aten::mm"].milliseconds > 0


def test_each_step_is_timed() -> None:
    seen: list[int] = []

    times = time_steps(lambda: seen.append(0), 3, CPU)

    assert len(seen) == len(times.steps) == 3
    assert all(x <= y for x, y in zip(times.host, times.steps, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "`batch` must be at least 1, but is 0"),
        (["--family", "none"], "`family` must be one of gemma2, moxe.* but is 'none'"),
        (["--size", "huge"], "`size` must be one of 340m"),
    ],
)
def test_what_cannot_be_profiled_is_named(
    options: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert profile.main([*options, "--device", "cpu"]) == 2
    assert re.search(message, capfd.readouterr().err)
