"""Tries malicious tokenizers and datasets: none runs code, or reads elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fairseq2.data.tokenizers import TokenizerModelError
from fairseq2.datasets import DatasetError

from moxe_plugin.data.hub import HubTexts
from moxe_plugin.data.shards import open_shards
from moxe_plugin.data.tokenizer import HgTextTokenizerConfig, load_hg_text_tokenizer
from tests.security.conftest import Payload
from tests.train.tiny_data import TinyData


def _write_code(payload: Payload, file: Path) -> None:
    file.write_text(f"import os\nos.system('touch {payload.marker}')\n")


def test_tokenizer_names_no_classes(
    safe_data: TinyData,
    tmp_path: Path,
    payload: Payload,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse_to_ask(*_args: object) -> str:
        raise AssertionError("The user was asked whether to run the code.")

    monkeypatch.setattr("builtins.input", refuse_to_ask)

    folder = tmp_path / "tokenizer"
    shutil.copytree(safe_data.tokenizer_dir, folder)

    _write_code(payload, folder / "evil.py")

    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["tokenizer_class"] = "EvilTokenizer"
    config["auto_map"] = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
    file.write_text(json.dumps(config))

    with pytest.raises(TokenizerModelError, match="is not a valid Hugging Face token"):
        load_hg_text_tokenizer(folder, HgTextTokenizerConfig())

    assert not payload.marker.exists()


def _read(folder: Path) -> list[str]:
    notes: list[str] = []

    return list(HubTexts(str(folder), None, "train", "text", notify=notes.append))


def test_dataset_with_a_script_is_refused(tmp_path: Path, payload: Payload) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    _write_code(payload, folder / "evil.py")

    (folder / "a.jsonl").write_text('{"text": "a"}\n')

    with pytest.raises(DatasetError, match="scripts are no longer supported"):
        _read(folder)

    assert not payload.marker.exists()


def test_offsets_are_not_unpickled(
    safe_data: TinyData, tmp_path: Path, payload: Payload
) -> None:
    folder = tmp_path / "tokens"
    shutil.copytree(safe_data.tokens_dir, folder)

    shards = open_shards(folder)
    info = shards.manifest.splits["train"].offsets
    np.save(folder / info.file, np.array([payload], dtype=object), allow_pickle=True)

    with pytest.raises(ValueError, match="allow_pickle=False"):
        shards.stream("train").offsets()

    assert not payload.marker.exists()


@pytest.mark.parametrize(
    "place", ["../secret.bin", "/etc/passwd", "a/../../secret.bin"]
)
def test_manifest_names_files_of_its_directory_only(
    safe_data: TinyData, tmp_path: Path, place: str
) -> None:
    folder = tmp_path / "tokens"
    shutil.copytree(safe_data.tokens_dir, folder)

    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())

    shard = manifest["splits"]["train"]["shards"][0]
    shutil.copy(folder / shard["file"], tmp_path / "secret.bin")
    shard["file"] = place
    file.write_text(json.dumps(manifest))

    with pytest.raises(DatasetError, match=r"`file` must be the name of a file"):
        open_shards(folder)
