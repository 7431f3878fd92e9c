"""Trains with secrets in the environment, and looks for them in all that is written."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final

import pytest

from moxe_plugin.cli import main
from moxe_plugin.train.secrets import list_secrets, mask_secrets
from tests.train.tiny_data import TinyData, pretrain

SECRETS: Final = {
    "HF_TOKEN": "hf_sekretsekret",
    "AWS_SECRET_ACCESS_KEY": "aws/sekret+key",
    "WANDB_API_KEY": "wandbsekret",
    "DB_PASSWORD": "pass sekret",
    "MY_SERVICE_CREDENTIALS": "credentialsekret",
}


@pytest.fixture
def _secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def _find_secrets(directory: Path) -> list[str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert len(files) > 5

    return [
        f"{file}: {value}"
        for file in files
        for value in SECRETS.values()
        if value.encode() in file.read_bytes()
    ]


@pytest.mark.usefixtures("_secrets")
def test_training_writes_no_secret(
    tiny_data: TinyData, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = {
        "regime.num_steps": 4,
        "lr_scheduler.config.num_warmup_steps": 1,
        "common.debug": True,
        "common.metric_recorders.tensorboard.enabled": True,
    }

    pretrain(tiny_data, tmp_path, overrides)

    assert _find_secrets(tmp_path) == []

    captured = capfd.readouterr()
    assert not any(v in captured.out + captured.err for v in SECRETS.values())

    # The log still tells of everything else.
    log = (tmp_path / "logs" / "rank_0.log").read_text()
    assert "Software - Python" in log
    assert "Task finished" in log

    # Downloads need them.
    assert os.environ["HF_TOKEN"] == SECRETS["HF_TOKEN"]


@pytest.mark.usefixtures("_secrets")
def test_failing_command_tells_no_secret(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # As when a configuration takes the address of its data from the environment.
    value = f"dataset.name={SECRETS['HF_TOKEN']}"

    with pytest.raises(SystemExit) as exc_info:
        main(["lm", "pretrain", str(tmp_path / "out"), "--config", value])

    assert exc_info.value.code == 2

    err = capfd.readouterr().err

    assert "*** is not a known dataset" in err
    assert SECRETS["HF_TOKEN"] not in err


def test_names_tell_secrets_from_other_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in list(os.environ):
        monkeypatch.delenv(name)

    secrets = {
        "HF_TOKEN": "a-token",
        "OPENAI_API_KEY": "a-longer-key",
        "SSH_KEY": "ssh-key",
        "github_token": "lower-case",
        "PGPASSWORD": "postgres",
    }
    others = {
        "PATH": "/usr/bin",
        "KEYBOARD": "qwerty-us",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "EMPTY_TOKEN": "",
    }

    for name, value in {**secrets, **others}.items():
        monkeypatch.setenv(name, value)

    assert set(list_secrets()) == set(secrets.values())


def test_longer_secret_is_masked_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "sekret")
    monkeypatch.setenv("B_TOKEN", "sekret-and-more")

    record = logging.LogRecord(
        "x", logging.INFO, "x.py", 1, "a %s b", ("sekret-and-more",), None
    )

    assert mask_secrets(record)
    assert record.getMessage() == "a *** b"
