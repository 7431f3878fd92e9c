"""Tests of `moxe_plugin.speed.history`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from moxe_plugin.speed import history

ROOT = Path(__file__).parents[2]


def is_repository() -> bool:
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", "HEAD"]

    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not is_repository(), reason="not a checkout of git")
def test_a_commit_is_timed_in_its_own_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "_ARCH", "tiny")
    monkeypatch.chdir(ROOT)

    options = [
        "--repeats",
        "2",
        "--threads",
        "1",
        "--name",
        "h",
        "--out",
        str(tmp_path),
    ]
    assert history.main(["HEAD", *options]) == 0

    [row] = json.loads((tmp_path / "h.json").read_text("utf-8"))["rows"]
    assert len(row["seconds_all"]) == 2
    assert row["tokens_per_s"] == pytest.approx(1024 / row["seconds"])
    assert f"| {row['commit']} |" in (tmp_path / "h.md").read_text("utf-8")


def test_directory_without_a_repository_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    assert history.main(["HEAD"]) == 2
    assert "must be of a git repository" in capsys.readouterr().err


@pytest.mark.skipif(not is_repository(), reason="not a checkout of git")
def test_unknown_commit_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)

    assert history.main(["no-such-commit", "--out", str(tmp_path)]) == 2
    assert "no-such-commit" in capsys.readouterr().err
