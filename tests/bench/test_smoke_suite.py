"""The whole path with real stages: text, shards, training, checkpoint, table."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.usefixtures("embedded_data")
def test_smoke_suite_trains_evaluates_and_tabulates(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moxe_plugin.bench", "smoke"]

    result = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr

    with tmp_path.joinpath("out", "tables", "smoke.csv").open() as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}

    assert set(rows) == {"MoxE", "uniform guess", "unigram guess", "bigram guess"}

    moxe = rows["MoxE"]
    run_dirs = list(tmp_path.joinpath("out").glob("moxe_embedded_*"))
    assert len(run_dirs) == 1

    uniform = float(rows["uniform guess"]["valid_loss_nats"])
    assert uniform == pytest.approx(math.log(2048), abs=1e-3)

    unigram, bigram = (
        float(rows[f"{name} guess"]["valid_loss_nats"])
        for name in ("unigram", "bigram")
    )
    assert bigram < unigram - 0.5 < uniform - 1.0

    # Twenty steps are too few to beat a guess, but enough to learn.
    lines = run_dirs[0].joinpath("train.jsonl").read_text().splitlines()
    losses = [
        record["NLL Loss"]
        for record in map(json.loads, lines)
        if record["Stage"] == "pretrain"
    ]
    assert losses[-1] < losses[0] - 0.1
    assert float(moxe["train_loss_nats"]) == pytest.approx(losses[-1])
    assert float(moxe["instruction_loss_after_nats"]) < float(
        moxe["instruction_loss_before_nats"]
    )
