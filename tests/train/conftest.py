"""Tiny data, and a model pretrained on it, for the tests of the recipes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.tiny_data import TinyData, make_tiny_data, pretrain


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    """Make the data once.

    :param tmp_path_factory: Makes the directory.

    :returns: Where the data is.
    """
    return make_tiny_data(tmp_path_factory.mktemp("tiny_data"))


@pytest.fixture(scope="session")
def pretrained_dir(
    tiny_data: TinyData, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Train a tiny MoxE for 8 steps, with checkpoints at 4 and 8.

    :param tiny_data: The data.
    :param tmp_path_factory: Makes the directory.

    :returns: The output directory of the training run.
    """
    output_dir = tmp_path_factory.mktemp("pretrained") / "run"

    pretrain(tiny_data, output_dir, {"regime.keep_last_n_checkpoints": 2})

    return output_dir
