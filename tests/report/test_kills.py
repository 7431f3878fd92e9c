"""Whenever a process is killed, what it wrote is the old or the whole new file."""

from __future__ import annotations

import itertools
import random
import shutil
from pathlib import Path

from moxe_plugin.report.files import read_json, write_json
from moxe_plugin.report.run_dirs import find_run_dirs, read_run, read_runs, write_run
from moxe_plugin.report.tables import write_tables
from tests.killing import at_file_operation, run_killed
from tests.report.synthetic import make_trained


def test_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    directory = tmp_path / "files"
    directory.mkdir()
    file = directory / "state.json"

    write_json(file, {"value": "old"})

    for number in itertools.count(1):
        is_killed = run_killed(
            lambda: write_json(file, {"value": "new" * 10_000}),
            at_file_operation(directory, number),
            log_file=tmp_path / "log",
        )

        if not is_killed:
            break

        assert read_json(file) == {"value": "old"}

    assert number > 3
    assert read_json(file) == {"value": "new" * 10_000}
    assert [f.name for f in directory.iterdir()] == ["state.json"]


def test_record_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    results_dir = tmp_path / "results"

    runs = [make_trained(loss=loss) for loss in (4.0, 3.0)]
    old, new = (read_run(write_run(results_dir, run, "x: 1")) for run in runs)

    assert old != new

    found = []

    for number in itertools.count(1):
        write_run(results_dir, runs[0], "x: 1")

        is_killed = run_killed(
            lambda: write_run(results_dir, runs[1], "x: 1"),
            at_file_operation(results_dir, number),
            log_file=tmp_path / "log",
        )

        records, damaged = read_runs(find_run_dirs(results_dir))

        assert damaged == []

        if not is_killed:
            break

        # Between two renames there is none; whoever writes records writes it again.
        assert records in ([old], [], [new])

        found.append(records)

    assert number > 20
    assert found[0] == [old]
    assert found[-1] == [new]
    assert found.count([]) <= 1
    assert records == [new]
    assert [d.name for d in results_dir.iterdir()] == [new.name]


def test_tables_are_the_old_or_the_new_ones(tmp_path: Path) -> None:
    rng = random.Random(9)

    results_dir = tmp_path / "results"
    tables_dir = results_dir / "tables"
    results_dir.mkdir()

    contents = []

    for loss in (4.0, 3.0):
        write_tables([make_trained(loss=loss)], [], tables_dir)

        contents.append({f.name: f.read_bytes() for f in tables_dir.iterdir()})

    assert contents[0] != contents[1]

    for number in sorted(rng.sample(range(1, 60), 10)):
        shutil.rmtree(tables_dir)
        tables_dir.mkdir()
        for name, content in contents[0].items():
            (tables_dir / name).write_bytes(content)

        run_killed(
            lambda: write_tables([make_trained(loss=3.0)], [], tables_dir),
            at_file_operation(tables_dir, number),
            log_file=tmp_path / "log",
        )

        for file in tables_dir.iterdir():
            if file.suffix != ".part":
                assert file.read_bytes() in [c[file.name] for c in contents]

        assert contents[0].keys() <= {f.name for f in tables_dir.iterdir()}
