"""Measures how much of evaluation texts is in a training text: ``moxe data overlap``.

The check of GPT-3 and The Pile: does an item share 13 consecutive words with the
training text? Words are normalised as :func:`moxe_plugin.data.ngrams.split_words` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from fairseq2.datasets import DatasetError
from tokenizers import Tokenizer

from moxe_plugin.data.documents import read_rows
from moxe_plugin.data.manifest import MANIFEST_FILE, compute_sha256
from moxe_plugin.data.ngrams import NgramIndex
from moxe_plugin.data.overlap_file import (
    EvalOverlap,
    Overlap,
    OverlapExample,
    SourceFile,
    TrainText,
)
from moxe_plugin.data.shards import open_shards
from moxe_plugin.data.tokenizer import find_tokenizer_file

NGRAM_SIZE: Final = 13
"""As in the appendices on contamination of GPT-3 (arXiv 2005.14165) and The Pile."""


@dataclass(kw_only=True)
class TextReader:
    """How texts are read: local files, or directories of token shards."""

    text_column: str = "text"
    """The key or column of the text; objects without it count with all their texts."""

    tokenizer_path: Path | None = None
    """The tokenizer of token shards, if it is not where their manifest says."""

    def read_items(self, path: Path, split: str) -> Iterator[list[str]]:
        """Read the texts of every item of a file, or of a split of token shards.

        An item is a block of a ``.txt`` file, a line of ``.jsonl``, a row of
        ``.parquet``, or a document of token shards.

        :param path: The file or directory.
        :param split: The split, for token shards.

        :yields: The texts of an item.

        :raises DatasetError: The path cannot be read, or an item has no text.
        """
        if path.is_dir():
            for text in self._read_shards(path, split):
                yield [text]

            return

        for place, row in read_rows(path):
            if isinstance(row.get(self.text_column), str):
                yield [row[self.text_column]]
            elif texts := list(_find_texts(row)):
                yield texts
            else:
                raise DatasetError(f"{place} has no text.")

    def _read_shards(self, path: Path, split: str) -> Iterator[str]:
        shards = open_shards(path, verify=True)
        manifest = shards.manifest

        if split not in manifest.splits:
            raise DatasetError(
                f"{path} has no split `{split}`. It has: {', '.join(manifest.splits)}."
            )

        file = self._find_tokenizer(path, manifest.tokenizer_name)

        if compute_sha256(file) != manifest.tokenizer_sha256:
            raise DatasetError(
                f"{file} is not the tokenizer that {path} was made with "
                f"({manifest.tokenizer_name}, sha256 {manifest.tokenizer_sha256}). "
                "Name that one with `--tokenizer`."
            )

        tokenizer = Tokenizer.from_file(str(file))
        stream = shards.stream(split)
        offsets = stream.offsets()

        for start, stop in pairwise(offsets.tolist()):
            # Without the separator at the end.
            tokens = stream.read(start, stop - 1)

            yield tokenizer.decode(tokens.tolist(), skip_special_tokens=False)

    def _find_tokenizer(self, path: Path, name: str) -> Path:
        if self.tokenizer_path is not None:
            return find_tokenizer_file(self.tokenizer_path)

        try:
            return find_tokenizer_file(Path(name))
        except FileNotFoundError:
            raise DatasetError(
                f"The tokenizer of {path} is not at {name}. Name it with `--tokenizer`."
            ) from None


def measure_overlap(
    train: Sequence[Path],
    evals: Mapping[str, Sequence[Path]],
    reader: TextReader,
    *,
    ngram_size: int = NGRAM_SIZE,
    num_examples: int = 3,
) -> Overlap:
    """Look for the n-grams of evaluation sets in a training text.

    The evaluation sets are held in memory, some 40 bytes per word; the training text is
    read once and not held.

    :param train: Files of the training text, or token shards (their ``train`` split).
    :param evals: The files of each evaluation set, or token shards (``valid`` split).
    :param reader: How to read them.
    :param ngram_size: The number of words in an n-gram.
    :param num_examples: The number of items to show of each set.

    :returns: The overlap.

    :raises DatasetError: A file cannot be read, or an evaluation set is empty.
    :raises ValueError: ``ngram_size`` is not positive.
    """
    sizes: dict[str, int] = {}

    def read_evals() -> Iterator[list[str]]:
        for name, paths in evals.items():
            sizes[name] = 0

            for path in paths:
                for texts in reader.read_items(path, "valid"):
                    sizes[name] += 1
                    yield texts

            if sizes[name] == 0:
                raise DatasetError(f"The evaluation set `{name}` has no items.")

    index = NgramIndex(read_evals(), ngram_size)

    num_documents = num_words = 0

    for path in train:
        counts = index.search(
            text for texts in reader.read_items(path, "train") for text in texts
        )
        num_documents += counts[0]
        num_words += counts[1]

    if num_words == 0:
        raise DatasetError("The training text has no words.")

    result = Overlap(
        ngram_size=ngram_size,
        train=TrainText(
            files=_describe(train), num_documents=num_documents, num_words=num_words
        ),
        evals={},
    )

    first = 0

    for name, paths in evals.items():
        items = slice(first, first + sizes[name])
        result.evals[name] = _summarize(index, items, _describe(paths), num_examples)
        first = items.stop

    return result


def _summarize(
    index: NgramIndex, items: slice, files: list[SourceFile], num_examples: int
) -> EvalOverlap:
    num_ngrams = index.count_ngrams()[items]
    num_found = index.count_found()[items]

    shares = num_found / np.maximum(num_ngrams, 1)

    # The largest share first; of equal shares the longest, then the first.
    order = np.lexsort((-num_found, -shares))[:num_examples]

    worst = [
        OverlapExample(
            item=int(i) + 1,
            num_ngrams=int(num_ngrams[i]),
            num_overlapping_ngrams=int(num_found[i]),
            ngram=index.first_found(items.start + int(i)),
        )
        for i in order
        if num_found[i]
    ]

    return EvalOverlap(
        files=files,
        num_items=len(num_ngrams),
        num_short_items=int((num_ngrams == 0).sum()),
        num_overlapping_items=int((num_found > 0).sum()),
        num_ngrams=int(num_ngrams.sum()),
        num_overlapping_ngrams=int(num_found.sum()),
        worst=worst,
    )


def _describe(paths: Sequence[Path]) -> list[SourceFile]:
    return [
        SourceFile(
            file=str(path),
            sha256=compute_sha256(path / MANIFEST_FILE if path.is_dir() else path),
        )
        for path in paths
    ]


def _find_texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case list():
            for item in value:
                yield from _find_texts(item)
        case dict():
            for item in value.values():
                yield from _find_texts(item)
