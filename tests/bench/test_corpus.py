"""The data of a suite, built from files."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from moxe_plugin.bench import corpus
from moxe_plugin.bench.corpus import build_data
from moxe_plugin.bench.resolution import resolve_tasks
from moxe_plugin.bench.suite import Corpus, Instructions, Suite, SuiteError, Task
from moxe_plugin.data.shards import open_shards
from moxe_plugin.data.tokenizer import (
    HgTextTokenizerConfig,
    find_tokenizer_file,
    load_hg_text_tokenizer,
)

# Texts that differ in digits only would share a split.
WORDS = ["".join(letters) for letters in product("abcd", repeat=3)]
TEXTS = [f"Document {word} of a small corpus." for word in WORDS]


def _make_suite(**changes: object) -> Suite:
    return Suite(name="mine", systems=[], seeds=[1], tasks=[], data="text", **changes)  # type: ignore[arg-type]  # of any keys


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """Return a suite with two files of text and one of instructions."""
    for name, texts in (("train", TEXTS), ("valid", ["Held out."])):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        tmp_path.joinpath(f"{name}.jsonl").write_text("".join(lines))

    lines = [json.dumps({"src": f"{w}?", "tgt": f"{w}."}) + "\n" for w in WORDS]
    tmp_path.joinpath("questions.jsonl").write_text("".join(lines))

    return _make_suite(
        corpus=Corpus(
            train_files=[str(tmp_path / "train.jsonl")],
            valid_files=[str(tmp_path / "valid.jsonl")],
            vocab_size=270,
        ),
        instructions=Instructions(
            files=[str(tmp_path / "questions.jsonl")], valid_fraction=0.2
        ),
    )


def test_text_becomes_a_tokenizer_and_shards(suite: Suite, tmp_path: Path) -> None:
    options = build_data(suite, tmp_path / "work")["pretrain_config"]

    tokenizer_dir = Path(options["tokenizer.path"])
    tokenizer = load_hg_text_tokenizer(tokenizer_dir, HgTextTokenizerConfig())
    shards = open_shards(Path(options["dataset.path"]), verify=True)

    assert tokenizer.vocab_info.size == 270
    assert shards.manifest.tokenizer_sha256 == tokenizer.sha256
    assert find_tokenizer_file(tokenizer_dir).parent == tokenizer_dir
    assert shards.manifest.splits["train"].num_documents == len(TEXTS)
    assert shards.manifest.splits["valid"].num_documents == 1


def test_instructions_are_split(suite: Suite, tmp_path: Path) -> None:
    options = build_data(suite, tmp_path / "work")["finetune_config"]

    directory = Path(options["dataset.path"])
    train, valid = (
        (directory / f"{split}.jsonl").read_text().splitlines()
        for split in ("train", "valid")
    )

    assert len(train) + len(valid) == len(WORDS)
    assert 0 < len(valid) < len(WORDS) / 2
    assert set(train).isdisjoint(valid)


def test_data_is_built_once_and_again_for_other_text(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_data(suite, tmp_path / "work")

    def fail(*_: object) -> None:
        raise AssertionError("built again")

    with monkeypatch.context() as context:
        context.setattr(corpus, "_make_part", fail)
        assert build_data(suite, tmp_path / "work") == first

    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"text": "One more."}\n')

    second = build_data(suite, tmp_path / "work")

    assert second["pretrain_config"] != first["pretrain_config"]
    assert second["finetune_config"] == first["finetune_config"]


@pytest.mark.parametrize("name", ["tokenizer", "tokens", "instructions"])
def test_kill_while_a_part_is_built_leaves_the_whole_ones(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    expected = build_data(suite, tmp_path / "expected")

    make_part = corpus._make_part
    built = []

    def killed(make: object, output_dir: Path) -> None:
        built.append(output_dir.name)
        if output_dir.name.startswith(name):
            output_dir.mkdir()
            (output_dir / "half.json").touch()
            raise KeyboardInterrupt

        make_part(make, output_dir)  # type: ignore[arg-type]  # a function

    with monkeypatch.context() as context:
        context.setattr(corpus, "_make_part", killed)
        with pytest.raises(KeyboardInterrupt):
            build_data(suite, tmp_path / "work")

    def count(make: object, output_dir: Path) -> None:
        rebuilt.append(output_dir.name)
        make_part(make, output_dir)  # type: ignore[arg-type]  # a function

    rebuilt: list[str] = []
    monkeypatch.setattr(corpus, "_make_part", count)
    build_data(suite, tmp_path / "work")

    # The part that was cut short, and those after it.
    assert sorted({*built, *rebuilt}) == sorted([*built[:-1], *rebuilt])

    for options in expected.values():
        for path in options.values():
            if path is None or "/" not in str(path):
                continue

            for file in Path(path).iterdir():
                relative = file.relative_to(tmp_path / "expected")
                assert (tmp_path / "work" / relative).read_bytes() == file.read_bytes()

    assert not list((tmp_path / "work").rglob("half.json"))


def test_missing_file_names_the_variable_and_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_DATA", str(tmp_path))
    suite = _make_suite(
        corpus=Corpus(train_files=["${env:MY_DATA:data}/no.jsonl"], vocab_size=270)
    )

    with pytest.raises(SuiteError) as caught:
        build_data(suite, tmp_path / "work")

    assert str(caught.value) == (
        f"`corpus.train_files`: '{tmp_path}/no.jsonl' does not exist. Set the "
        "environment variable MY_DATA, or name your own text with --text FILE "
        "--valid-text FILE."
    )


def test_tokenizer_of_your_own_is_used(suite: Suite, tmp_path: Path) -> None:
    first = build_data(suite, tmp_path / "work")["pretrain_config"]
    assert suite.corpus is not None

    own = Corpus(
        train_files=suite.corpus.train_files,
        valid_fraction=0.3,
        tokenizer=first["tokenizer.path"],
        max_tokens=200,
    )
    options = build_data(_make_suite(corpus=own), tmp_path / "work")["pretrain_config"]
    manifest = open_shards(Path(options["dataset.path"]), verify=True).manifest

    assert options["tokenizer.path"] != first["tokenizer.path"]
    assert manifest.vocab_size == 270
    assert 0 < manifest.splits["valid"].num_documents < len(TEXTS) / 2
    assert sum(s.num_documents for s in manifest.splits.values()) <= len(TEXTS)


def test_corpus_without_a_way_to_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="must name a `tokenizer`, or `vocab_size`"):
        build_data(_make_suite(corpus=Corpus(train_files=["a.txt"])), tmp_path)


def test_tasks_become_plain_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("{}\n")
    monkeypatch.setenv("MY_DATA", str(tmp_path))

    tasks = resolve_tasks(
        [
            Task(task="plain"),
            Task(task="other", file="${env:MY_DATA:data}/texts.jsonl", limit=3),
            Task(task="third", stage="finetuned", arguments={"size": "full"}),
        ]
    )

    assert tasks == [
        "plain",
        {
            "task": "other",
            "limit": 3,
            "file": str(file),
            "file_sha256": (
                "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"
            ),
        },
        {"task": "third", "stage": "finetuned", "arguments": {"size": "full"}},
    ]

    with pytest.raises(SuiteError, match=r"`file` of the task x: .* Take the task out"):
        resolve_tasks([Task(task="x", file=str(tmp_path / "no.jsonl"))])
