"""Tiny data, and a model pretrained on it, for the tests of the recipes."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import IO

import pytest
from fairseq2.utils.yaml import RuamelYamlLoader

from tests.train.tiny_data import TinyData, make_tiny_data, pretrain


@pytest.fixture(scope="session", autouse=True)
def _parse_once() -> Iterator[None]:
    # For each run fairseq2 parses its configuration two dozen times, and all its asset
    # cards: half of what a run of few steps takes.
    original = RuamelYamlLoader.load
    known: dict[str, list[object]] = {}

    def load(self: RuamelYamlLoader, input_: Path | IO[str]) -> list[object]:
        if not isinstance(input_, Path):
            return original(self, input_)

        with self._file_system.open_text(input_) as file:
            text = file.read()

            if text not in known:
                file.seek(0)
                known[text] = original(self, file)

        return deepcopy(known[text])

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(RuamelYamlLoader, "load", load)

        yield


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
