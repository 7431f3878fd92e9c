"""Metrics that a training stage wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moxe_plugin.bench.metrics import (
    read_last_train_metrics,
    read_train_metrics,
    read_valid_metrics,
    sum_up,
)


def _write(file: Path, *lines: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_steps_that_a_continued_run_repeats_count_once(tmp_path: Path) -> None:
    lines = [{"Step": s, "NLL Loss": float(i)} for i, s in enumerate([10, 20, 30, 20])]
    _write(tmp_path / "metrics/train.jsonl", *lines)

    read = read_train_metrics(tmp_path, "pretrain")

    assert [(x["Step"], x["NLL Loss"]) for x in read] == [(10, 0.0), (20, 3.0)]
    assert all(x["Stage"] == "pretrain" for x in read)


def test_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics/train.jsonl"
    _write(file, {"Step": 10})
    file.write_text(file.read_text() + '{"Step": 2' + '{"Step": 20}\n')

    assert [x["Step"] for x in read_train_metrics(tmp_path, "pretrain")] == [10, 20]
    assert read_last_train_metrics(tmp_path) == {"Step": 20}


def test_validation_splits_are_named(tmp_path: Path) -> None:
    _write(tmp_path / "metrics/valid.jsonl", {"Step": 10})
    _write(tmp_path / "metrics/valid/other.jsonl", {"Step": 10})

    read = read_valid_metrics(tmp_path, "pretrain")

    assert [x["Split"] for x in read] == ["valid", "other"]


def test_progress_reads_the_last_whole_line(tmp_path: Path) -> None:
    assert read_last_train_metrics(tmp_path) == {}

    file = tmp_path / "metrics/train.jsonl"
    _write(file, {"Step": 10}, {"Step": 20})
    file.write_text(file.read_text() + '{"Step": 3')

    assert read_last_train_metrics(tmp_path) == {"Step": 20}


def test_missing_metrics_make_no_numbers(tmp_path: Path) -> None:
    assert sum_up(read_train_metrics(tmp_path, "pretrain")) == (None, None)
