"""Texts that can be read on from where an earlier reading stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from moxe_plugin.data.build import Document
from moxe_plugin.data.documents import (
    SplitFractions,
    assign_splits,
    check_file,
    read_texts,
)


class TextSource(Protocol):
    """Texts in an order that does not change, and how many of them were read."""

    def __iter__(self) -> Iterator[str]:
        """Read on from where reading stopped."""

    def state_dict(self) -> dict[str, Any]:
        """Tell where reading stopped.

        :returns: The state, as JSON can hold it.
        """

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where another reading of the same texts stopped.

        :param state: Its state.
        """

    def describe(self) -> dict[str, Any]:
        """Tell what is read; it differs when the texts may differ.

        :returns: The description, as JSON can hold it.
        """


class FileTexts:
    """The documents of local files; see :func:`read_texts`.

    :param files: The files.
    :param text_column: The key or column of the text.
    """

    def __init__(self, files: Sequence[Path], text_column: str) -> None:
        self._files = files
        self._text_column = text_column
        self._num_read = 0

    def __iter__(self) -> Iterator[str]:
        """Read on from where reading stopped."""
        texts = read_texts(self._files, self._text_column)

        for text in islice(texts, self._num_read, None):
            self._num_read += 1
            yield text

    def state_dict(self) -> dict[str, Any]:
        """Tell where reading stopped.

        :returns: The number of documents read.
        """
        return {"num_read": self._num_read}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where another reading of the same files stopped.

        :param state: Its state.
        """
        self._num_read = int(state["num_read"])

    def describe(self) -> dict[str, Any]:
        """Tell which files are read, their size and when they were changed.

        :returns: The description.

        :raises DatasetError: A file does not exist.
        """
        for file in self._files:
            check_file(file)

        stats = [(file, file.stat()) for file in self._files]

        return {
            "text_column": self._text_column,
            "files": [[str(f.resolve()), s.st_size, s.st_mtime_ns] for f, s in stats],
        }


class DocumentStream:
    """The documents of several sources, one source after the other.

    :param parts: The sources, each with the split of all its texts, or with how to
        choose one.
    """

    def __init__(
        self, parts: Sequence[tuple[TextSource, str | SplitFractions]]
    ) -> None:
        self._parts = parts
        self._part_nr = 0

    def __iter__(self) -> Iterator[Document]:
        """Read on from where reading stopped."""
        while self._part_nr < len(self._parts):
            yield from assign_splits(*self._parts[self._part_nr])

            self._part_nr += 1

    def state_dict(self) -> dict[str, Any]:
        """Tell where reading stopped: after the last document taken.

        :returns: The state, as JSON can hold it.
        """
        return {
            "part": self._part_nr,
            "sources": [source.state_dict() for source, _ in self._parts],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where another reading of the same sources stopped.

        :param state: Its state.
        """
        self._part_nr = int(state["part"])

        for (source, _), source_state in zip(
            self._parts, state["sources"], strict=True
        ):
            source.load_state_dict(source_state)

    def describe(self) -> dict[str, Any]:
        """Tell what is read; it differs when the documents may differ.

        :returns: The description, as JSON can hold it.
        """
        return {
            f"source {nr}": {
                **source.describe(),
                "split": split if isinstance(split, str) else vars(split).copy(),
            }
            for nr, (source, split) in enumerate(self._parts, start=1)
        }
