"""Reads documents from local files and from Hugging Face datasets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fairseq2.datasets import DatasetError

from moxe_plugin.data.build import Document
from moxe_plugin.data.cleaning import hash_fraction

SUFFIXES: Final = (".txt", ".jsonl", ".parquet")


@dataclass(kw_only=True)
class SplitFractions:
    """Which share of documents is held out."""

    valid: float = 0.01
    """The share of the ``valid`` split."""

    test: float = 0.01
    """The share of the ``test`` split; the rest is ``train``."""

    def choose(self, text: str) -> str:
        """Choose a split by a hash of the letters of a document.

        Documents that differ in case, digits or punctuation only share a split.

        :param text: The document.

        :returns: ``train``, ``valid`` or ``test``.
        """
        fraction = hash_fraction(text, "split")

        if fraction < self.valid:
            return "valid"

        return "test" if fraction < self.valid + self.test else "train"


def assign_splits(
    texts: Iterable[str], split: str | SplitFractions
) -> Iterator[Document]:
    """Give every text a split; texts of white space only are left out.

    :param texts: The texts.
    :param split: The split of all, or how to choose one.

    :yields: The documents.
    """
    for text in texts:
        if text.strip():
            name = split if isinstance(split, str) else split.choose(text)

            yield Document(name, text)


def read_texts(files: Sequence[Path], text_column: str) -> Iterator[str]:
    """Read the documents of local files.

    A ``.txt`` file is one document per block of lines; blocks are separated by blank
    lines. A ``.jsonl`` file has one object per line, a ``.parquet`` file one row.

    :param files: The files.
    :param text_column: The key or column of the text.

    :yields: The documents, in order.

    :raises DatasetError: A file cannot be read.
    """
    for file in files:
        if not file.is_file():
            raise DatasetError(f"{file} does not exist.")

        try:
            match file.suffix:
                case ".txt":
                    yield from _read_txt(file)
                case ".jsonl":
                    yield from _read_jsonl(file, text_column)
                case ".parquet":
                    yield from _read_parquet(file, text_column)
                case _:
                    raise DatasetError(
                        f"{file} must be of a known kind: {', '.join(SUFFIXES)}."
                    )
        except UnicodeDecodeError as ex:
            raise DatasetError(
                f"{file} is not UTF-8: {ex.reason} near byte {ex.start} of a block. "
                "Convert it first, for example with `iconv -t UTF-8`."
            ) from None


def _read_txt(file: Path) -> Iterator[str]:
    block: list[str] = []

    with file.open(encoding="utf-8") as fp:
        for line in fp:
            if line.strip():
                block.append(line)
            elif block:
                yield "".join(block).rstrip("\n")
                block = []

    if block:
        yield "".join(block).rstrip("\n")


def _read_jsonl(file: Path, text_column: str) -> Iterator[str]:
    with file.open(encoding="utf-8") as fp:
        for line_nr, line in enumerate(fp, start=1):
            if not line.strip():
                continue

            try:
                row = json.loads(line)
            except json.JSONDecodeError as ex:
                raise DatasetError(f"{file}:{line_nr} is not JSON: {ex}") from None

            if not isinstance(row, dict):
                raise DatasetError(f"{file}:{line_nr} must be a JSON object.")

            yield _get_text(row, text_column, f"{file}:{line_nr}")


def _read_parquet(file: Path, text_column: str) -> Iterator[str]:
    from pyarrow import ArrowInvalid, parquet

    try:
        table = parquet.ParquetFile(file)
    except ArrowInvalid as ex:
        raise DatasetError(f"{file} is not a Parquet file: {ex}") from None

    if text_column not in table.schema_arrow.names:
        raise _missing_column(str(file), text_column, table.schema_arrow.names)

    for batch in table.iter_batches(columns=[text_column]):
        for row in batch.to_pylist():
            yield _get_text(row, text_column, str(file))


def read_hg_dataset(
    name: str, config: str | None, split: str, text_column: str, *, streaming: bool
) -> Iterator[str]:
    """Read the documents of a dataset of the Hugging Face hub, or a directory.

    :param name: The name, for example ``HuggingFaceFW/fineweb-edu``.
    :param config: Its configuration, for example ``sample-10BT``.
    :param split: Its split.
    :param text_column: The column of the text.
    :param streaming: Whether to read while downloading, and no more than is used.

    :yields: The documents, in order.

    :raises DatasetError: The dataset cannot be read.
    """
    import datasets

    try:
        rows: Any = datasets.load_dataset(
            name, config, split=split, streaming=streaming
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as ex:
        raise DatasetError(f"The dataset {name} cannot be read: {ex}") from ex

    for row in rows:
        yield _get_text(row, text_column, name)


def _get_text(row: dict[str, Any], text_column: str, place: str) -> str:
    if text_column not in row:
        raise _missing_column(place, text_column, row)

    text = row[text_column]

    if not isinstance(text, str):
        raise DatasetError(
            f"{place}: `{text_column}` must be a text, but is a {type(text).__name__}."
        )

    return text


def _missing_column(place: str, name: str, columns: Iterable[str]) -> DatasetError:
    return DatasetError(
        f"{place} has no `{name}`. It has: {', '.join(columns) or 'nothing'}."
    )
