"""The command ``moxe bench``, with stages that train nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moxe_plugin.bench import stages
from moxe_plugin.bench.__main__ import main
from tests.bench import fake_stages

_SUITE = """
name: mine
data: embedded
seeds: [2]
systems:
  - {name: moxe, label: MoxE, pretrain: smoke}
  - {name: xlstm, label: xLSTM, pretrain: smoke}
tasks: []
"""


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the arguments of a suite with fake stages."""
    monkeypatch.setattr(stages, "PRELOAD", ("moxe_plugin.bench.children",))
    monkeypatch.setattr(stages, "resolve_suite", fake_stages.resolve)
    monkeypatch.setattr(stages, "measure_steps", fake_stages.measure_steps)
    monkeypatch.setattr(
        stages,
        "STAGE_FUNCTIONS",
        {
            "pretrain": fake_stages.train,
            "evaluate": fake_stages.evaluate,
            "guess": fake_stages.guess,
        },
    )

    suite_file = tmp_path / "mine.yaml"
    suite_file.write_text(_SUITE)

    return [str(suite_file), "--out", str(tmp_path / "out"), "--jobs", "1"]


def test_suite_ends_with_its_table(
    args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 0

    output = capsys.readouterr().out
    assert "[4/7] MoxE, seed 2: pretrain: done in" in output
    assert "valid loss, nats" in output
    assert f"Records: {tmp_path}/out/<run>" in output.replace("\n", "")
    assert (tmp_path / "out" / "tables" / "mine.md").is_file()


def test_dry_run_prints_the_commands_and_does_nothing(
    args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*args, "--dry-run", "--only", "xlstm", "--seeds", "5"]) == 0

    output = capsys.readouterr().out
    # 20 steps of 2 sequences of 50 tokens, at 3 x 1000 FLOPs and 10 tokens a second
    line = "xLSTM, seed 5: pretrain: to do; 6e+06 FLOPs, about 3 min (measured)"
    assert line in output
    assert "xLSTM, seed 5: evaluate: to do\n" in output
    assert (
        "In all: 6e+06 FLOPs of training, about 3 min with 1 at a time; without "
        "4 stages whose time no earlier record tells."
    ) in output
    assert f"fairseq2 lm pretrain {tmp_path}/out/work/xlstm_s5/pretrain" in output
    assert "MoxE" not in output
    assert not (tmp_path / "out" / "work" / "xlstm_s5").exists()


def test_dry_run_takes_the_time_of_earlier_runs_of_the_recipe(
    args: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(args) == 0
    for file in (tmp_path / "out").glob("*/environment.json"):
        environment = json.loads(file.read_text())
        environment["wall_s"] = dict.fromkeys(environment["wall_s"], 4000.0)
        file.write_text(json.dumps(environment))
    capsys.readouterr()

    assert main([*args, "--dry-run", "--only", "moxe", "--seeds", "2", "3"]) == 0

    output = capsys.readouterr().out
    assert "MoxE, seed 2: pretrain: recorded in moxe_embedded" in output
    assert (
        "MoxE, seed 3: pretrain: to do; 6e+06 FLOPs, about 67 min (recorded)" in output
    )
    assert "MoxE, seed 3: evaluate: to do; about 67 min (recorded)" in output
    assert "In all: 6e+06 FLOPs of training, about 2.2 h with 1 at a time." in output


def test_failure_is_shown_and_exits_with_1(
    args: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(stages.STAGE_FUNCTIONS, "pretrain", fake_stages.train_failing)

    assert main(args) == 1

    output = capsys.readouterr().out
    assert "RuntimeError: the pretrain of moxe_s2 went wrong" in output
    assert "uniform guess" in output


def test_changed_configuration_exits_with_2_until_redone(
    args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args += ["--only", "moxe"]
    assert main(args) == 0

    file = Path(args[0])
    file.write_text(_SUITE + "pretrain_config: {num_steps: 30}\n")
    # Without its record the earlier run is only known to the work directory.
    for path in (tmp_path / "out").glob("moxe*/environment.json"):
        path.unlink()

    assert main(args) == 2

    error = capsys.readouterr().err
    assert "regime.num_steps: 20 -> 30" in error
    assert "--redo" in error

    assert main([*args, "--redo"]) == 0


def test_unknown_system_exits_with_2(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*args, "--only", "gpt"]) == 2

    assert "Known systems: moxe, xlstm" in capsys.readouterr().err
