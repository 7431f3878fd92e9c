"""A suite that is killed with all its processes, at any point, and called again."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from moxe_plugin.report.run_dirs import find_run_dirs, read_run
from tests.bench.fake_stages import count_calls
from tests.bench.killed_bench import CHILD_POINTS, PARENT_POINTS

_SUITE = """
name: mine
data: embedded
seeds: [2]
systems:
  - {name: moxe, label: MoxE, pretrain: smoke, finetune: instruct/quickstart}
tasks: []
"""


def _run(directory: Path) -> int:
    args = [str(directory / "mine.yaml"), "--out", str(directory / "out"), "--jobs=1"]

    # A session of its own: what kills its group must not kill the tests.
    result = subprocess.run(
        [sys.executable, "-m", "tests.bench.killed_bench", *args],
        cwd=Path(__file__).parents[2],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=600,
        check=False,
    )

    return result.returncode


def _read_files(out: Path) -> dict[Path, bytes]:
    return {
        file: file.read_bytes()
        for run_dir in find_run_dirs(out)
        for file in run_dir.iterdir()
    }


def test_nothing_is_lost_and_nothing_finished_is_done_again(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(_SUITE)
    out = tmp_path / "out"

    exit_codes: list[int] = []
    files: dict[Path, bytes] = {}

    for _ in range(len(PARENT_POINTS) + len(CHILD_POINTS) + 1):
        exit_codes.append(_run(tmp_path))

        # What is there is whole, and stays as it is.
        for run_dir in find_run_dirs(out):
            read_run(run_dir)
        assert files.items() <= _read_files(out).items()
        files = _read_files(out)

    assert exit_codes == [-signal.SIGKILL] * (len(exit_codes) - 1) + [0]

    calls = {
        stage: count_calls(out / "work" / "moxe_s2", stage)
        for stage in ("pretrain", "finetune", "evaluate")
    }
    # Killed at their very end, two stages were not known to be done.
    assert calls == {"pretrain": 2, "finetune": 1, "evaluate": 2}

    records = {path.name: read_run(path) for path in find_run_dirs(out)}
    assert len(records) == 4
    assert not list(out.glob(".*"))

    (record,) = (r for name, r in records.items() if name.startswith("moxe"))
    assert [(x["Stage"], x["Step"]) for x in record.train] == [
        *(("pretrain", 10), ("pretrain", 20), ("finetune", 10), ("finetune", 20))
    ]
    assert list(record.items["last_word"].items) == ["a", "b"]
