"""Tests of token shards on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fairseq2.datasets import DatasetError

from moxe_plugin.data.shard_writer import ShardWriter
from moxe_plugin.data.shards import open_shards
from tests.data.streams import write_positions


def _write(path: Path, *, vocab_size: int = 300, overwrite: bool = False) -> None:
    with ShardWriter(
        path,
        tokenizer_name="t",
        tokenizer_sha256="x",
        vocab_size=vocab_size,
        eos_idx=0,
        source="s",
        overwrite=overwrite,
        max_shard_tokens=4,
    ) as writer:
        writer.add_document("train", [5, 6, 7], 11)
        writer.add_document("train", [8], 3)
        writer.add_document("valid", [9, 10], 4)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(300, "uint16"), (65_536, "uint16"), (70_000, "uint32")]
)
def test_stream_is_documents_between_separators(
    tmp_path: Path, vocab_size: int, dtype: str
) -> None:
    path = tmp_path / "shards"
    _write(path, vocab_size=vocab_size)

    shards = open_shards(path, verify=True)
    stream = shards.stream("train")

    assert shards.manifest.dtype == dtype
    assert stream.read(0, len(stream)).tolist() == [0, 5, 6, 7, 0, 8, 0]
    assert stream.offsets().tolist() == [1, 5, 7]
    assert (stream.info.num_bytes, stream.info.num_documents) == (14, 2)
    assert len(stream.info.shards) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["shards"]


def test_read_crosses_shards(tmp_path: Path) -> None:
    stream = open_shards(write_positions(tmp_path / "s", 200)).stream("train")
    whole = stream.read(0, len(stream))

    assert len(stream.info.shards) > 3

    for start in range(0, len(stream), 7):
        for stop in range(start, len(stream) + 1, 11):
            np.testing.assert_array_equal(stream.read(start, stop), whole[start:stop])

    with pytest.raises(ValueError, match="must lie within the stream"):
        stream.read(0, len(stream) + 1)


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "shards"

    with pytest.raises(ValueError, match="less than the vocabulary size"):
        _write(path, vocab_size=10)

    assert list(tmp_path.iterdir()) == []


def test_existing_directory_is_replaced_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "shards"
    _write(path)

    with pytest.raises(FileExistsError):
        _write(path)

    _write(path, vocab_size=500, overwrite=True)

    assert open_shards(path).manifest.vocab_size == 500


def test_damage_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "shards"
    _write(path)
    file = path / "train_00001.bin"
    content = file.read_bytes()

    file.write_bytes(content[:-1])
    with pytest.raises(DatasetError, match="must have 4 bytes, but has 3"):
        open_shards(path)

    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    open_shards(path)
    with pytest.raises(DatasetError, match="sha256 differs"):
        open_shards(path, verify=True)

    file.unlink()
    with pytest.raises(DatasetError, match="missing"):
        open_shards(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"splits": {}}', "damaged"),
        (None, "format version 99"),
    ],
    ids=["not-json", "not-object", "no-fields", "other-version"],
)
def test_bad_manifest_is_explained(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "shards"
    _write(path)
    file = path / "manifest.json"

    if text is None:
        text = json.dumps({**json.loads(file.read_text()), "format_version": 99})

    file.write_text(text)

    with pytest.raises(DatasetError, match=message):
        open_shards(path)


def test_other_directory_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no manifest\.json.*moxe data build"):
        open_shards(tmp_path)
