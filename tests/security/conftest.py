"""A trained model to put malicious files into, and what they would do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.train.tiny_data import TinyData, make_tiny_data, pretrain


class Payload:
    """Makes a file when it is unpickled without restriction.

    :param marker: The file.
    """

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        """Say what to call."""
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def payload(tmp_path: Path) -> Payload:
    """Make what a malicious file holds.

    :param tmp_path: Where it would leave its mark.

    :returns: The payload.
    """
    return Payload(tmp_path / "it_ran")


@pytest.fixture(scope="session")
def safe_data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Make the data once.

    :param tmp_path_factory: Makes the directory.

    :returns: Where the data is.
    """
    return make_tiny_data(tmp_path_factory.mktemp("safe_data"))


@pytest.fixture(scope="session")
def safe_run(safe_data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tiny model for 8 steps.

    :param safe_data: The data.
    :param tmp_path_factory: Makes the directory.

    :returns: The output directory.
    """
    run = tmp_path_factory.mktemp("safe") / "run"

    pretrain(safe_data, run)

    return run


@pytest.fixture
def run_copy(safe_run: Path, tmp_path: Path) -> Path:
    """Copy a training run of 8 steps.

    :param safe_run: The run.
    :param tmp_path: Where it goes.

    :returns: The copy, for a test to tamper with.
    """
    copy = tmp_path / "run"
    shutil.copytree(safe_run, copy)

    return copy
