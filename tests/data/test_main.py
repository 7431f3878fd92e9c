"""Tests of ``moxe data``, of the documents it reads and of what it registers."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from fairseq2.data.tokenizers import get_tokenizer_family_name
from fairseq2.datasets import DatasetError, get_dataset_family_name
from pyarrow import parquet
from tokenizers import Tokenizer

from moxe_plugin.data.__main__ import main
from moxe_plugin.data.bpe import train_bpe
from moxe_plugin.data.documents import (
    SplitFractions,
    assign_splits,
    count_rows,
    read_texts,
)
from moxe_plugin.data.shards import open_shards
from moxe_plugin.data.tokenizer import HgTextTokenizerConfig, load_hg_text_tokenizer

TEXTS = [f"Document {chr(97 + i % 26)}{chr(97 + i // 26)} of many." for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_bpe(TEXTS, 300, path)

    return path


def _write_jsonl(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))

    return file


def test_all_kinds_of_files_are_read(tmp_path: Path) -> None:
    jsonl = _write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    txt = tmp_path / "b.txt"
    txt.write_text("three\nlines\n\n\nfour\n")
    table = tmp_path / "c.parquet"
    parquet.write_table(pa.table({"text": ["five"], "n": [1]}), table)

    texts = list(read_texts([jsonl, txt, table], "text"))

    assert texts == ["one", "two", "three\nlines", "four", "five"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b"[1]", "must be a JSON object"),
        ("a.jsonl", b'{"body": "x", "id": 1}', "has no `text`. It has: body, id"),
        ("a.jsonl", b'{"text": 1}', "must be a text, but is a int"),
        ("a.parquet", b"x", "is not a Parquet file"),
        ("a.csv", b"x", r"known kind: \.txt"),
    ],
)
def test_bad_files_are_explained(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content)

    with pytest.raises(DatasetError, match=message):
        list(read_texts([file], "text"))


def test_missing_column_of_parquet_lists_the_columns(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"body": ["x"], "n": [1]}), file)

    with pytest.raises(DatasetError, match="It has: body, n"):
        list(read_texts([file], "text"))


def test_splits_follow_a_hash_of_the_letters() -> None:
    fractions = SplitFractions(valid=0.2, test=0.1)
    splits = [d.split for d in assign_splits([*TEXTS, "  "], fractions)]

    assert len(splits) == len(TEXTS)
    assert 0.1 < splits.count("valid") / len(splits) < 0.3
    assert 0.05 < splits.count("test") / len(splits) < 0.2
    assert splits == [fractions.choose(t.upper() + "!") for t in TEXTS]


def test_build_writes_every_document_once(tmp_path: Path, tokenizer_dir: Path) -> None:
    file = _write_jsonl(tmp_path / "a.jsonl", TEXTS)
    valid = _write_jsonl(tmp_path / "v.jsonl", ["A <|endoftext|> in a text."])
    output = tmp_path / "shards"

    args = ["build", str(output), "--tokenizer", str(tokenizer_dir)]
    args += ["--files", str(file), "--valid-files", str(valid)]

    assert main([*args, "--test-fraction", "0.1"]) == 0

    shards = open_shards(output, verify=True)
    splits = shards.manifest.splits

    assert splits["train"].num_documents + splits["test"].num_documents == len(TEXTS)

    tokenizer = load_hg_text_tokenizer(tokenizer_dir, HgTextTokenizerConfig())
    stream = shards.stream("valid")
    tokens = stream.read(0, len(stream))

    # The separator spelt out in the text is text, not a separator.
    assert (tokens == 0).sum() == 2
    assert tokenizer.hg_tokenizer.decode(tokens[1:-1]) == "A <|endoftext|> in a text."


def test_build_stops_at_the_limit(tmp_path: Path, tokenizer_dir: Path) -> None:
    file = _write_jsonl(tmp_path / "a.jsonl", TEXTS * 5)
    output = tmp_path / "shards"

    args = ["build", str(output), "--tokenizer", str(tokenizer_dir), "--files"]

    assert main([*args, str(file), "--max-tokens", "100"]) == 0

    splits = open_shards(output).manifest.splits.values()
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    sizes = [len(e.ids) + 1 for e in tokenizer.encode_batch(TEXTS)]
    num_documents = sum(s.num_documents for s in splits)

    # Each split begins with a separator that belongs to no document.
    assert sum(s.num_tokens - 1 for s in splits) == sum(sizes[:num_documents])
    assert sum(sizes[: num_documents - 1]) < 100 <= sum(sizes[:num_documents])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-tokens", "0"], "`--max-tokens` must be positive, but is 0"),
        (["--valid-fraction", "-0.1"], "must not be negative"),
        (["--test-fraction", "1"], "must leave something to train on"),
    ],
    ids=["no_tokens", "negative", "nothing_left"],
)
def test_wrong_amounts_are_refused(
    tmp_path: Path,
    tokenizer_dir: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    file = _write_jsonl(tmp_path / "a.jsonl", TEXTS)

    args = ["build", str(tmp_path / "shards"), "--tokenizer", str(tokenizer_dir)]

    assert main([*args, "--files", str(file), *options]) == 2
    assert message in capsys.readouterr().err


def test_tokenizer_and_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _write_jsonl(tmp_path / "a.jsonl", TEXTS)
    tok, output = str(tmp_path / "tok"), str(tmp_path / "shards")

    train = ["tokenizer", "--output", tok, "--vocab-size", "280", "--files", str(file)]
    assert main(train) == 0

    build = ["build", output, "--tokenizer", tok, "--files", str(file)]
    assert main(build) == 0
    assert main(build) == 2
    assert "give --overwrite" in capsys.readouterr().err
    assert main([*build, "--overwrite"]) == 0

    assert main(["info", output, "--verify"]) == 0
    assert "280 entries" in capsys.readouterr().out

    assert main(["info", output, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["path"] == output
    assert document["vocab_size"] == 280
    assert document["splits"]["train"]["num_documents"] > 0
    assert document["is_verified"] is False

    Path(output, "train_00000.bin").write_bytes(b"")
    assert main(["info", output]) == 1
    assert "damaged" in capsys.readouterr().err


def test_asset_cards_name_registered_families() -> None:
    for name in ("moxe_embedded", "moxe_embedded_full"):
        assert get_dataset_family_name(name) == "moxe_tokens"
        assert get_dataset_family_name(f"{name}_instructions") == "moxe_instructions"
        assert get_tokenizer_family_name(f"{name}_tokenizer") == "moxe_hg"


def test_rows_are_counted_before_they_are_read(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("\n\none\nstill one\n \ntwo\n\n\nthree")
    jsonl = _write_jsonl(tmp_path / "b.jsonl", TEXTS)
    table = tmp_path / "c.parquet"
    parquet.write_table(pa.table({"text": ["x", "y"]}), table)

    for files in ([text], [jsonl], [table], [text, jsonl, table]):
        assert count_rows(files) == len(list(read_texts(files, "text")))

    assert count_rows([tmp_path / "nothing.txt"]) is None
    text.rename(tmp_path / "d.parquet")
    assert count_rows([tmp_path / "d.parquet"]) is None
