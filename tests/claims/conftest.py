"""Tiny trained runs, and a text to measure them on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.train.tiny_data import make_tiny_data, pretrain


class TinyRuns(NamedTuple):
    """Where they are."""

    work_dir: Path
    """Holds ``<system>_s<seed>/pretrain`` as the work directory of a suite does."""

    text: Path
    lambada: Path


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> TinyRuns:
    """Train two seeds of MoxE and one of xLSTM for two steps each.

    :param tmp_path_factory: Makes the directory.

    :returns: Where everything is.
    """
    path = tmp_path_factory.mktemp("claims")

    data = make_tiny_data(path / "data")
    runs = TinyRuns(path / "work", path / "text.jsonl", path / "lambada.jsonl")

    for name, family, seed in (
        ("moxe_s1", "moxe", 1),
        ("moxe_s2", "moxe", 2),
        ("xlstm_s1", "xlstm", 1),
    ):
        pretrain(
            data,
            runs.work_dir / name / "pretrain",
            {
                "model.family": family,
                "common.seed": seed,
                "lr_scheduler.config.num_warmup_steps": 1,
                "regime.num_steps": 2,
                "regime.validate_every_n_steps": 2,
                "regime.checkpoint_every_n_steps": 2,
            },
        )

    _write_texts(runs.text, [_story(number) for number in range(3)])
    _write_texts(runs.lambada, [f"Three times {n} is not {n}." for n in range(5)])

    return runs


def _story(number: int) -> str:
    return " ".join(f"The double of {n} is {2 * n}." for n in range(number, 100, 7))


def _write_texts(file: Path, texts: list[str]) -> None:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
