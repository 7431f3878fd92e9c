"""Builds the data of a suite from files: tokenizer, token shards, instructions.

Everything lies below ``<work>/data`` in directories that are named by a hash of what
they are made from, and each part appears at once: a kill leaves whole parts, and other
text never gets the place of this one.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from fairseq2.datasets import DatasetError
from fairseq2.logging import log
from fairseq2.utils.config import ReplaceEnvDirective, StandardConfigProcessor
from fairseq2.utils.env import StandardEnvironment

from moxe_plugin.bench.stage_state import hash_config
from moxe_plugin.bench.suite import Corpus, Instructions, Suite, SuiteError
from moxe_plugin.data.bpe import train_bpe
from moxe_plugin.data.build import Document, ShardEncoding, build_shards
from moxe_plugin.data.documents import SplitFractions, assign_splits, read_texts
from moxe_plugin.data.hub import HubTexts
from moxe_plugin.data.instruction_encoding import read_instructions
from moxe_plugin.data.manifest import compute_sha256
from moxe_plugin.data.retrying import StreamError

_VARIABLE: Final = re.compile(r"\$\{env:(\w+)")


def build_data(suite: Suite, work_dir: Path) -> dict[str, Any]:
    """Build what a suite's ``corpus`` and ``instructions`` describe, if it is missing.

    :param suite: The suite.
    :param work_dir: Where work is done.

    :returns: Options of all systems that make them read it: ``pretrain_config`` and
        ``finetune_config``.

    :raises SuiteError: A file is missing or cannot be read.
    """
    options: dict[str, Any] = {"pretrain_config": {}, "finetune_config": {}}

    try:
        if suite.corpus is not None:
            directory = _build_corpus(suite.corpus, suite.data, work_dir / "data")

            options["pretrain_config"] = {
                "dataset.path": str(directory / "tokens"),
                "tokenizer.name": None,
                "tokenizer.path": str(directory / "tokenizer"),
                "tokenizer.family": "moxe_hg",
            }

        if suite.instructions is not None:
            directory = _build_instructions(suite.instructions, work_dir / "data")

            options["finetune_config"] = {"dataset.path": str(directory)}
    except (DatasetError, StreamError) as ex:
        raise SuiteError(f"The data of `{suite.name}` cannot be built: {ex}") from ex

    return options


def expand(value: Any) -> Any:
    """Replace ``${env:NAME:default}`` by the environment variable.

    :param value: Plain values.

    :returns: The same with variables replaced.
    """
    processor = StandardConfigProcessor([ReplaceEnvDirective(StandardEnvironment())])

    content: Any = processor.process({"value": value})

    return content["value"]


def find_file(text: str, place: str, way_out: str) -> Path:
    """Find a file that a suite names.

    :param text: Its path; ``${env:NAME:default}`` stands for an environment variable.
    :param place: What messages call the key.
    :param way_out: What else the user can do if there is no such file.

    :returns: The file.

    :raises SuiteError: There is no such file.
    """
    file = Path(expand(text)).absolute()

    if not file.exists():
        names = _VARIABLE.findall(text)
        advice = f"Set the environment variable {names[0]}, or " if names else ""
        way_out = way_out if advice else way_out[:1].upper() + way_out[1:]

        raise SuiteError(f"{place}: '{file}' does not exist. {advice}{way_out}")

    return file


def _build_corpus(corpus: Corpus, name: str, data_dir: Path) -> Path:
    if corpus.tokenizer is None and (corpus.vocab_size is None or corpus.hub):
        raise SuiteError(
            "`corpus` must name a `tokenizer`, or `vocab_size` and `train_files` to "
            "train one on."
        )

    def find(key: str, paths: Sequence[str]) -> list[Path]:
        way_out = "name your own text with --text FILE --valid-text FILE."

        return [find_file(path, f"`corpus.{key}`", way_out) for path in paths]

    train_files = find("train_files", corpus.train_files)
    valid_files = find("valid_files", corpus.valid_files)

    if bool(train_files) == bool(corpus.hub):
        raise SuiteError("`corpus` must have either `train_files` or `hub`.")

    own_tokenizer = None
    if corpus.tokenizer is not None:
        own_tokenizer = find_file(
            corpus.tokenizer, "`corpus.tokenizer`", "train one: `vocab_size`."
        )

    key = {
        **asdict(replace(corpus, tokenizer=None, hub=expand(corpus.hub))),
        "train_files": [compute_sha256(file) for file in train_files],
        "valid_files": [compute_sha256(file) for file in valid_files],
        "tokenizer": own_tokenizer and _hash_tokenizer(own_tokenizer),
    }
    directory = data_dir / f"{name}-{hash_config(key)[:12]}"

    def make_tokenizer(output_dir: Path) -> None:
        if own_tokenizer is not None:
            _copy_tokenizer(own_tokenizer, output_dir)
        else:
            assert corpus.vocab_size is not None

            texts = read_texts(train_files, corpus.text_column)
            train_bpe(texts, corpus.vocab_size, output_dir)

    def make_tokens(output_dir: Path) -> None:
        build_shards(
            _read_documents(corpus, train_files, valid_files),
            output_dir,
            ShardEncoding(
                tokenizer_path=directory / "tokenizer",
                tokenizer_name=directory.name,
                max_tokens=corpus.max_tokens,
            ),
            source=corpus.hub or ", ".join(file.name for file in train_files),
        )

    _make(directory / "tokenizer", make_tokenizer)
    _make(directory / "tokens", make_tokens)

    return directory


def _read_documents(
    corpus: Corpus, train_files: Sequence[Path], valid_files: Sequence[Path]
) -> Iterator[Document]:
    # Held-out files first: `max_tokens` must not cut them off.
    yield from assign_splits(read_texts(valid_files, corpus.text_column), "valid")

    texts: Iterable[str]
    if corpus.hub is None:
        texts = read_texts(train_files, corpus.text_column)
    else:
        texts = HubTexts(
            expand(corpus.hub),
            corpus.hub_config,
            "train",
            corpus.text_column,
            notify=partial(log.warning, "{}"),
        )

    valid = 0.0 if valid_files else corpus.valid_fraction

    yield from assign_splits(texts, SplitFractions(valid=valid, test=0.0))


def _build_instructions(instructions: Instructions, data_dir: Path) -> Path:
    way_out = "leave `instructions` and `finetune` out of the suite."
    files = [
        find_file(path, "`instructions.files`", way_out) for path in instructions.files
    ]

    key = {**asdict(instructions), "files": [compute_sha256(file) for file in files]}
    directory = data_dir / f"instructions-{hash_config(key)[:12]}"

    def make(output_dir: Path) -> None:
        output_dir.mkdir()

        splits: dict[str, list[str]] = {"train": [], "valid": []}
        fractions = SplitFractions(valid=instructions.valid_fraction, test=0.0)

        for file in files:
            # Finds lines that are no instructions.
            for _ in read_instructions(file):
                pass

            for line in file.read_text(encoding="utf-8").split("\n"):
                if line.strip():
                    splits[fractions.choose(line)].append(f"{line}\n")

        for split, lines in splits.items():
            output_file = output_dir / f"{split}.jsonl"
            output_file.write_text("".join(lines), encoding="utf-8")

    _make(directory, make)

    return directory


def _make(directory: Path, make: Callable[[Path], None]) -> None:
    # Only what is whole gets the name; what a kill left is thrown away.
    if directory.exists():
        return

    part = directory.with_name(f".{directory.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)

    _make_part(make, part / directory.name)

    (part / directory.name).rename(directory)
    part.rmdir()


def _make_part(make: Callable[[Path], None], output_dir: Path) -> None:
    make(output_dir)


def _hash_tokenizer(path: Path) -> list[str]:
    return [compute_sha256(file) for file in _list_tokenizer_files(path)]


def _copy_tokenizer(path: Path, output_dir: Path) -> None:
    output_dir.mkdir()

    for file in _list_tokenizer_files(path):
        shutil.copyfile(file, output_dir / file.name)


def _list_tokenizer_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.json")) if path.is_dir() else [path]
