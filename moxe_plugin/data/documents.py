"""Reads documents from local files and from Hugging Face datasets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

    :param files: The files, as :func:`read_rows` reads them.
    :param text_column: The key or column of the text.

    :yields: The documents, in order.

    :raises DatasetError: A file cannot be read, or a row has no text.
    """
    for file in files:
        for place, row in read_rows(file, text_column):
            yield get_text(row, text_column, place)


def count_rows(files: Sequence[Path]) -> int | None:
    """Count the rows of local files, to tell how long it will take to read them.

    :param files: The files, as :func:`read_rows` reads them.

    :returns: The number; ``None`` if a file cannot be read, which :func:`read_rows`
        explains.
    """
    from pyarrow import ArrowException, parquet

    num_rows = 0

    for file in files:
        try:
            if file.suffix == ".parquet":
                num_rows += parquet.read_metadata(file).num_rows
                continue

            with file.open("rb") as fp:
                has_text = [bool(line.strip()) for line in fp]
        except (ArrowException, OSError):
            return None

        if file.suffix == ".txt":
            # A block begins where a line with text follows one without.
            before = [False, *has_text[:-1]]
            num_rows += sum(h and not b for h, b in zip(has_text, before, strict=True))
        else:
            num_rows += sum(has_text)

    return num_rows


def read_rows(
    file: Path, text_column: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the rows of a local file.

    A ``.txt`` file has one row per block of lines, with the key ``text``; blocks are
    separated by blank lines. A ``.jsonl`` file has one object per line, a ``.parquet``
    file one row.

    :param file: The file.
    :param text_column: The only column that is needed; a block of a ``.txt`` file has
        this key. ``None`` means all.

    :yields: Where the row is, for messages, and the row.

    :raises DatasetError: The file cannot be read.
    """
    check_file(file)

    match file.suffix:
        case ".txt":
            for block in _read_txt(file):
                yield str(file), {text_column or "text": block}
        case ".jsonl":
            yield from _read_jsonl(file)
        case ".parquet":
            yield from _read_parquet(file, text_column)
        case _:
            raise DatasetError(
                f"{file} must be of a known kind: {', '.join(SUFFIXES)}."
            )


def check_file(file: Path) -> None:
    """Make sure that a file exists.

    :param file: The file.

    :raises DatasetError: It does not, or is a directory.
    """
    if not file.exists():
        raise DatasetError(f"{file} does not exist.")

    if not file.is_file():
        raise DatasetError(f"{file} is not a file. Name the files in it.")


def _read_lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open("rb") as fp:
        for line_nr, line in enumerate(fp, start=1):
            try:
                text = line.decode("utf-8-sig" if line_nr == 1 else "utf-8")
            except UnicodeDecodeError as ex:
                raise DatasetError(
                    f"{file}:{line_nr} is not UTF-8: {ex.reason} at byte "
                    f"{ex.start + 1} of the line. Convert the file first, for example "
                    "with `iconv -f LATIN1 -t UTF-8`."
                ) from None

            yield line_nr, text.replace("\r\n", "\n")


def _read_txt(file: Path) -> Iterator[str]:
    block: list[str] = []

    for _, line in _read_lines(file):
        if line.strip():
            block.append(line)
        elif block:
            yield "".join(block).rstrip("\n")
            block = []

    if block:
        yield "".join(block).rstrip("\n")


def _read_jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for line_nr, line in _read_lines(file):
        if not line.strip():
            continue

        place = f"{file}:{line_nr}"

        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as ex:
            raise DatasetError(f"{place} is not JSON: {ex}") from None

        if not isinstance(row, dict):
            raise DatasetError(
                f"{place} must be a JSON object, but is a {type(row).__name__}."
            )

        yield place, row


def _read_parquet(
    file: Path, text_column: str | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names

            if text_column is not None and text_column not in names:
                raise _missing_column(str(file), text_column, names)

            columns = None if text_column is None else [text_column]

            row_nr = 0

            for batch in table.iter_batches(columns=columns):
                for row in batch.to_pylist():
                    row_nr += 1
                    yield f"{file}, row {row_nr}", row
    except (ArrowException, OSError) as ex:
        raise DatasetError(
            f"{file} is not a Parquet file, or damaged: {ex}. Get it again."
        ) from None


def get_text(row: Mapping[str, Any], text_column: str, place: str) -> str:
    """Return the text of a row.

    :param row: The row.
    :param text_column: The key of the text.
    :param place: Where the row is, for messages.

    :returns: The text.

    :raises DatasetError: There is none, or it cannot be written as UTF-8.
    """
    if text_column not in row:
        raise _missing_column(place, text_column, row)

    text = row[text_column]

    if not isinstance(text, str):
        kind = "null" if text is None else f"a {type(text).__name__}"

        raise DatasetError(f"{place}: `{text_column}` must be a text, but is {kind}.")

    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as ex:
            raise DatasetError(
                f"{place}: `{text_column}` is not Unicode text: {ex.reason} at "
                f"character {ex.start + 1}. JSON escapes such a character as a pair."
            ) from None

    return text


def _missing_column(place: str, name: str, columns: Iterable[str]) -> DatasetError:
    return DatasetError(
        f"{place} has no `{name}`. It has: {', '.join(columns) or 'nothing'}."
    )
