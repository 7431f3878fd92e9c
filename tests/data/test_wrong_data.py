"""A table of wrong and damaged data: what the user is told, and the exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fairseq2.datasets import DatasetError
from fairseq2.recipe.error import RecipeError, SplitNotKnownError
from fairseq2.utils.validation import ValidationError

from moxe_plugin.data.__main__ import main
from moxe_plugin.data.manifest import compute_sha256
from tests.train.tiny_data import TinyData, make_tiny_data, pretrain

TEXT = b'{"text": "One two three."}\n'


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return make_tiny_data(tmp_path_factory.mktemp("tiny_data"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "no document has any text"),
        ("a.jsonl", b'{"text": ""}\n{"text": " \\n"}\n', "no document has any text"),
        ("a.txt", b"\n\n \n", "no document has any text"),
        ("a.jsonl", TEXT + b"{\n", "a.jsonl:2 is not JSON: Expecting property name"),
        ("a.jsonl", TEXT + b"nope\n", "a.jsonl:2 is not JSON: Expecting value"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1 is not JSON: maximum recursion"),
        ("a.jsonl", b'["a"]\n', "a.jsonl:1 must be a JSON object, but is a list."),
        ("a.jsonl", b'{"body": "a"}\n', "a.jsonl:1 has no `text`. It has: body."),
        ("a.jsonl", b'{"text": null}\n', "`text` must be a text, but is null."),
        ("a.jsonl", b'{"text": 3}\n', "`text` must be a text, but is a int."),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: `text` is not Unicode text"),
        ("a.jsonl", TEXT + b'{"text": "\xe9"}\n', "a.jsonl:2 is not UTF-8: invalid"),
        ("a.txt", b"fine\n\n\xff\xfe\n", "a.txt:3 is not UTF-8: invalid start byte"),
        ("a.parquet", b"PAR1 and no more", "a.parquet is not a Parquet file, or"),
        ("a.csv", b"text\na\n", "must be of a known kind: .txt, .jsonl, .parquet."),
        ("missing.jsonl", None, "missing.jsonl does not exist."),
    ],
    ids=[
        "empty_file",
        "empty_texts",
        "blank_lines",
        "cut_line",
        "no_json",
        "deep_json",
        "no_object",
        "no_text_field",
        "null_text",
        "number",
        "lone_surrogate",
        "latin1_jsonl",
        "utf16_txt",
        "damaged_parquet",
        "other_kind",
        "missing",
    ],
)
def test_text_that_cannot_be_built_is_explained(
    tmp_path: Path,
    data: TinyData,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes | None,
    message: str,
) -> None:
    file = tmp_path / name

    if content is not None:
        file.write_bytes(content)

    args = ["build", str(tmp_path / "shards"), "--files", str(file)]

    assert main([*args, "--tokenizer", str(data.tokenizer_dir)]) == 1

    error = capsys.readouterr().err
    assert error.startswith("moxe data: ")
    assert message in error
    assert error.count("\n") == 1
    assert [f.name for f in tmp_path.iterdir()] == [name] * (content is not None)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--tokenizer", "{tmp}/none"], 1, "The tokenizer {tmp}/none does not exist."),
        (["--tokenizer", "{tmp}"], 1, "{tmp} has no tokenizer.json. Name a Hugging"),
        (["--tokenizer", "{tmp}/a.jsonl"], 1, "is not a valid Hugging Face tokenizer"),
        (["--eos-token", "<eos>"], 1, "`eos_token` must be in the vocabulary"),
        (["--files", "{tmp}"], 1, "{tmp} is not a file. Name the files in it."),
        (["--max-tokens", "-3"], 2, "`--max-tokens` must be positive, but is -3."),
        (["--valid-fraction", "nan"], 2, "but are nan and 0.01."),
        (["--valid-fraction", "0.6", "--test-fraction", "0.4"], 2, "0.6 and 0.4."),
        (["--valid-files", "{tmp}/b.txt"], 1, "{tmp}/b.txt does not exist."),
    ],
    ids=[
        "no_tokenizer",
        "no_tokenizer_json",
        "no_tokenizer_file",
        "eos",
        "directory",
        "max_tokens",
        "nan",
        "nothing_left",
        "valid_file",
    ],
)
def test_wrong_options_are_explained(
    tmp_path: Path,
    data: TinyData,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    message: str,
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(TEXT)

    args = ["build", str(tmp_path / "shards"), "--tokenizer", str(data.tokenizer_dir)]
    args += ["--files", str(file), *(o.format(tmp=tmp_path) for o in options)]

    assert main(args) == code
    assert message.format(tmp=tmp_path) in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 1, "There is no text to train a tokenizer on."),
        (["--vocab-size", "100"], 2, "`vocab_size` must be at least 258, but is 100"),
        (["--max-documents", "0"], 2, "`--max-documents` must be positive, but is 0."),
    ],
    ids=["no_text", "vocab_size", "max_documents"],
)
def test_tokenizer_that_cannot_be_trained_is_explained(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    message: str,
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n")

    args = ["tokenizer", "--output", str(tmp_path / "tok"), "--files", str(file)]

    assert main([*args, *options]) == code
    assert message in capsys.readouterr().err
    assert not tmp_path.joinpath("tok").exists()


def test_smaller_vocabulary_than_asked_for_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(TEXT)

    args = ["tokenizer", "--output", str(tmp_path / "tok"), "--files", str(file)]

    assert main([*args, "--vocab-size", "5000"]) == 0

    captured = capsys.readouterr()
    model = json.loads((tmp_path / "tok" / "tokenizer.json").read_text())["model"]
    num_entries = len(model["vocab"])

    assert 258 <= num_entries < 300
    assert f"a tokenizer of {num_entries} entries" in captured.out
    assert "`--vocab-size` is 5000, but the text has nothing more" in captured.err


def test_overwrite_replaces_nothing_but_shards(
    tmp_path: Path, data: TinyData, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine" / "a.jsonl"
    file.parent.mkdir()
    file.write_bytes(TEXT)

    args = ["build", str(file.parent), "--files", str(file), "--overwrite"]

    assert main([*args, "--tokenizer", str(data.tokenizer_dir)]) == 2
    assert "is not a directory of token shards" in capsys.readouterr().err
    assert file.exists()


def _flip_bit(path: Path) -> None:
    file = path / "train_00000.bin"
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)


def _cut(path: Path) -> None:
    file = path / "train_00000.bin"
    file.write_bytes(file.read_bytes()[:-7])


def _remove(path: Path) -> None:
    path.joinpath("train_00000.bin").unlink()


def _cut_manifest(path: Path) -> None:
    file = path / "manifest.json"
    file.write_text(file.read_text()[:-40])


def _garble_manifest(path: Path) -> None:
    path.joinpath("manifest.json").write_bytes(b"\xff\xfe{}")


def _change_manifest(path: Path, **changes: object) -> None:
    file = path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _escape(path: Path) -> None:
    splits = json.loads(path.joinpath("manifest.json").read_text())["splits"]
    splits["train"]["shards"][0]["file"] = "../../etc/passwd"
    _change_manifest(path, splits=splits)


def _write_big_tokens(path: Path) -> None:
    file = path / "train_00000.bin"
    tokens = np.fromfile(file, dtype="<u2")
    tokens[:] = 60_000
    tokens.tofile(file)

    splits = json.loads(path.joinpath("manifest.json").read_text())["splits"]
    splits["train"]["shards"][0]["sha256"] = compute_sha256(file)
    _change_manifest(path, splits=splits)


_DAMAGE: list[Any] = [
    pytest.param(_flip_bit, "train_00000.bin is damaged: its sha256", id="flipped"),
    pytest.param(_cut, "train_00000.bin is damaged: it must have", id="cut"),
    pytest.param(_remove, "is named in the manifest, but missing", id="missing"),
    pytest.param(_cut_manifest, "manifest.json is damaged", id="cut_manifest"),
    pytest.param(_garble_manifest, "it is not UTF-8", id="garbled_manifest"),
    pytest.param(
        lambda p: _change_manifest(p, format_version=9),
        "format version 9",
        id="version",
    ),
    pytest.param(_escape, "but is '../../etc/passwd' instead", id="path_escape"),
]


@pytest.mark.parametrize(("damage", "message"), _DAMAGE)
def test_damaged_shards_are_explained(
    tmp_path: Path,
    data: TinyData,
    capfd: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    message: str,
) -> None:
    path = tmp_path / "tokens"
    shutil.copytree(data.tokens_dir, path)
    damage(path)

    assert main(["info", str(path), "--verify"]) == 1
    assert message in capfd.readouterr().err

    log = _fail_to_train(data, tmp_path, {"dataset.path": str(path)}, DatasetError)
    error = capfd.readouterr().err

    assert message in log
    assert "Traceback" not in error
    assert message in error


def _fail_to_train(
    data: TinyData,
    tmp_path: Path,
    overrides: Mapping[str, object],
    error: type[Exception],
) -> str:
    with pytest.raises(error) as info:
        pretrain(data, tmp_path / "run", overrides)

    return str(info.value)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"dataset.seq_len": 0}, ValidationError, "`seq_len` must be greater than"),
        ({"dataset.seq_len": 1}, RecipeError, "`seq_len` must be at least 2, but is 1"),
        ({"dataset.batch_size": 0}, ValidationError, "`batch_size` must be greater"),
        ({"dataset.batch_size": 9999}, RecipeError, "fewer than one batch of 9999"),
        ({"dataset.path": "/none"}, RecipeError, "Build one with `moxe data build`"),
        ({"dataset.train_split": "trian"}, SplitNotKnownError, "trian"),
    ],
    ids=["seq_len_0", "seq_len_1", "batch_0", "batch_huge", "no_shards", "no_split"],
)
def test_wrong_options_of_training_are_explained(
    tmp_path: Path,
    data: TinyData,
    capfd: pytest.CaptureFixture[str],
    overrides: Mapping[str, object],
    error: type[Exception],
    message: str,
) -> None:
    assert message in _fail_to_train(data, tmp_path, overrides, error)
    assert "Traceback" not in capfd.readouterr().err


def test_shards_of_another_tokenizer_are_refused(
    tmp_path: Path, data: TinyData, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tokens"
    shutil.copytree(data.tokens_dir, path)
    _change_manifest(path, tokenizer_sha256="0" * 64, tokenizer_name="the other")

    message = _fail_to_train(data, tmp_path, {"dataset.path": str(path)}, RecipeError)

    assert "made with another tokenizer (the other, 320 entries)" in message
    assert "Traceback" not in capfd.readouterr().err


def test_tokens_beyond_the_vocabulary_end_a_training_with_a_clear_error(
    tmp_path: Path, data: TinyData, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tokens"
    shutil.copytree(data.tokens_dir, path)
    _write_big_tokens(path)

    message = _fail_to_train(data, tmp_path, {"dataset.path": str(path)}, DatasetError)

    assert "train_00000.bin is damaged: it has the token 60000, but" in message
    assert "Traceback" not in capfd.readouterr().err
