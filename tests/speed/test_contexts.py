"""Tests of `moxe_plugin.speed.contexts`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moxe_plugin.speed import contexts


@pytest.mark.usefixtures("fairseq2_setup")
def test_lengths_take_turns_and_leave_states_of_one_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fairseq2.init_fairseq2", lambda: None)
    options = ["--arch", "tiny", "--tokens", "2", "--repeats", "3", "--threads", "1"]

    assert (
        contexts.main([*options, "--length", "5", "600", "--out", str(tmp_path)]) == 0
    )

    rows = json.loads((tmp_path / "contexts.json").read_text("utf-8"))["rows"]
    assert [row["length"] for row in rows] == [5, 600]
    assert all(len(row["seconds_all"]) == 3 for row in rows)
    assert rows[0]["state_bytes"] == rows[1]["state_bytes"] > 0
    assert "| 600 " in (tmp_path / "contexts.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "0"], "`repeats` must be at least 1, but is 0"),
        (["--length", "0"], "`length` must be at least 1"),
    ],
)
def test_values_that_cannot_be_measured_with_are_errors(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert contexts.main(options) == 2
    assert message in capsys.readouterr().err
