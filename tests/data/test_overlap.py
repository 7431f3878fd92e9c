"""Tests of ``moxe data overlap`` and of the file it writes."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest

from moxe_plugin.data.__main__ import main
from moxe_plugin.data.bpe import train_bpe
from moxe_plugin.data.overlap_file import (
    Overlap,
    format_overlap_note,
    read_overlap,
)

WORDS = [f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(200)]


def _text(start: int, stop: int) -> str:
    return " ".join(WORDS[start:stop])


def _write_jsonl(file: Path, rows: list[object]) -> Path:
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))

    return file


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return _write_jsonl(
        tmp_path / "train.jsonl", [{"text": _text(0, 60)}, {"text": _text(60, 100)}]
    )


def _run(train: Path, *evals: str, options: tuple[str, ...] = ()) -> Overlap:
    output = train.parent / "out" / "overlap.json"
    args = ["overlap", "--train", str(train), "--output", str(output), *options]

    assert main([*args, "--eval", *evals]) == 0

    return read_overlap(output)


def test_items_with_thirteen_words_of_the_training_text_overlap(
    tmp_path: Path, train: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _write_jsonl(
        tmp_path / "a.jsonl",
        [
            # 13 words in other case and punctuation; 12 words; across two documents.
            {"text": "Before: " + _text(5, 18).upper().replace(" ", ", ") + "!"},
            {"text": _text(20, 32) + " then another word"},
            {"text": _text(50, 70).replace(WORDS[61], "other")},
            {"text": _text(20, 40)},
            {"text": "too short"},
        ],
    )

    overlap = _run(train, f"a={file}")
    found = overlap.evals["a"]

    assert (found.num_items, found.num_short_items) == (5, 1)
    assert found.num_overlapping_items == 2
    assert found.share == 2 / 4
    assert found.num_ngrams == 2 + 3 + 8 + 8
    assert found.num_overlapping_ngrams == 1 + 8
    assert [(e.item, e.num_overlapping_ngrams) for e in found.worst] == [(4, 8), (1, 1)]
    assert found.worst[0].ngram == _text(20, 33)
    assert found.files[0].sha256 == sha256(file.read_bytes()).hexdigest()
    assert (overlap.train.num_documents, overlap.train.num_words) == (2, 100)
    assert "a: 2 of 5 items overlap (50.00%" in capsys.readouterr().out


def test_objects_without_the_text_column_count_with_all_their_texts(
    tmp_path: Path, train: Path
) -> None:
    rows: list[object] = [
        {"query": "What?", "choices": [_text(0, 13), "no"], "gold": 0},
        {"query": _text(0, 7), "choices": [_text(7, 14)], "gold": 0},
    ]
    found = _run(train, f"q={_write_jsonl(tmp_path / 'q.jsonl', rows)}").evals["q"]

    # No n-gram crosses from one text of an item to the next.
    assert (found.num_overlapping_items, found.num_short_items) == (1, 1)


def test_files_of_one_name_are_one_set(tmp_path: Path, train: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("one\n\ntwo\n")
    second.write_text(_text(3, 30))

    overlap = _run(train, f"a={first}", f"b={first}", f"a={second}")

    assert [e.item for e in overlap.evals["a"].worst] == [3]
    assert overlap.evals["b"].share is None
    assert [Path(f.file).name for f in overlap.evals["a"].files] == ["a.txt", "b.txt"]


def test_shorter_ngrams_can_be_asked_for(tmp_path: Path, train: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(_text(40, 48))

    options = ("--ngram-size", "8")

    assert _run(train, f"a={file}", options=options).evals["a"].share == 1.0


def test_token_shards_are_read_as_text(
    tmp_path: Path, train: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, other = tmp_path / "tokenizer", tmp_path / "other"
    train_bpe(WORDS, 300, tokenizer)
    train_bpe(["other text"], 260, other)
    valid = _write_jsonl(tmp_path / "v.jsonl", [{"text": "x"}, {"text": _text(7, 27)}])
    shards = tmp_path / "shards"

    args = ["build", str(shards), "--tokenizer", str(tokenizer)]
    args += ["--files", str(train), "--valid-files", str(valid), "--test-fraction", "0"]
    assert main(args) == 0

    overlap = _run(shards, f"a={shards}")

    assert (overlap.train.num_documents, overlap.train.num_words) == (2, 100)
    assert overlap.evals["a"].num_overlapping_ngrams == 8

    args = ["overlap", "--train", str(shards), "--eval", f"a={shards}"]
    assert main([*args, "--tokenizer", str(other)]) == 1
    assert "is not the tokenizer that" in capsys.readouterr().err

    tokenizer.rename(tmp_path / "moved")
    assert main(args) == 1
    assert "Name it with `--tokenizer`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--eval", "a"], 2, "`--eval` must be NAME=FILE, but is `a`"),
        (["--eval", "a=no.jsonl"], 1, "no.jsonl does not exist"),
        (["--eval", "a={empty}"], 1, "The evaluation set `a` has no items"),
        (["--eval", "a={no_text}"], 1, "no_text.jsonl:1 has no text"),
        (["--eval", "a={a}", "--ngram-size", "0"], 2, "`--ngram-size` must be"),
        (["--eval", "a={a}", "--num-examples", "-1"], 2, "`--num-examples` must not"),
        (["--eval", "a={a}", "--train", "{empty}"], 1, "training text has no words"),
    ],
    ids=["no_name", "missing", "empty", "no_text", "size", "examples", "no_words"],
)
def test_wrong_input_is_explained(
    tmp_path: Path,
    train: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    message: str,
) -> None:
    names = {"a": train, "empty": tmp_path / "empty.jsonl"}
    names["no_text"] = _write_jsonl(tmp_path / "no_text.jsonl", [{"gold": 1}])
    names["empty"].write_text("\n")

    args = ["overlap", "--train", str(train), *(o.format(**names) for o in options)]

    assert main(args) == code
    assert message in capsys.readouterr().err


def test_file_is_read_as_it_was_written(
    tmp_path: Path, train: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlap = _run(train, f"train itself={train}", options=("--json",))
    printed = capsys.readouterr().out

    assert printed == overlap.to_json()
    assert overlap.evals["train itself"].share == 1.0

    digest = sha256(train.read_bytes()).hexdigest()[:12]
    note = format_overlap_note(overlap)

    assert note == (
        "Evaluation items that share 13 consecutive words with the training text "
        f"{train} (sha256 {digest}): train itself 2 of 2 (100.00%)."
    )

    data = json.loads(printed)

    changes: list[tuple[dict[str, object], str]] = [
        ({"schema_version": 2}, "has schema version 2"),
        ({"ngram_size": "13"}, "`ngram_size` must be an integer, but is '13'"),
        ({"evals": []}, "is damaged or not written by"),
        ({"train": {}}, "KeyError: 'files'"),
    ]

    for change, message in changes:
        file = tmp_path / "changed.json"
        file.write_text(json.dumps({**data, **change}))

        with pytest.raises(ValueError, match=message):
            read_overlap(file)

    data["evals"]["train itself"]["num_overlapping_items"] = 3
    file.write_text(json.dumps(data))

    with pytest.raises(ValueError, match="`train itself` contradict each other"):
        read_overlap(file)

    file.write_text(printed[:-9])

    with pytest.raises(ValueError, match=r"changed\.json is damaged"):
        read_overlap(file)
