"""Gathers the documents and questions of the embedded corpus."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from moxe_plugin.console import Stages
from moxe_plugin.data.cleaning import Cleaner, hash_fraction
from moxe_plugin.data.documentation import (
    TOPICS,
    DocEntry,
    list_files,
    read_docstrings,
    read_topics,
)
from moxe_plugin.data.questions import QuestionCollector

HELD_OUT_FRACTION: Final = 0.04
"""The share of documents in ``valid``, and in ``test``."""


class NamedDocument(NamedTuple):
    """A cleaned document."""

    split: str
    """``train``, ``valid`` or ``test``."""

    name: str
    """What it documents."""

    text: str
    """Its prose."""


@dataclass
class Corpus:
    """What was gathered."""

    documents: list[NamedDocument] = field(default_factory=list)
    """The documents, in order of reading."""

    num_chars: int = 0
    """The size of the documents."""

    cleaner: Cleaner = field(default_factory=Cleaner)
    """Knows every paragraph of the documents."""

    questions: QuestionCollector = field(default_factory=QuestionCollector)
    """Questions about the documentation."""

    def add(self, entry: DocEntry) -> None:
        """Clean an entry and add it, and the question about it.

        :param entry: The documentation.
        """
        text = self.cleaner.clean(entry.text)
        split = None

        if text is not None:
            split = choose_split(text)
            self.documents.append(NamedDocument(split, entry.name, text))
            self.num_chars += len(text)

        self.questions.add(entry, split)

    def write_documents(self, output_dir: Path) -> None:
        """Write a jsonl file of the documents of each held-out split.

        :param output_dir: The directory to make.
        """
        output_dir.mkdir()

        for split in ("valid", "test"):
            lines = [
                json.dumps({"text": d.text, "name": d.name}) + "\n"
                for d in self.documents
                if d.split == split
            ]

            file = output_dir / f"{split}.jsonl"
            file.write_text("".join(lines), encoding="utf-8")


def gather(sources: Sequence[str], max_chars: int, stages: Stages) -> Corpus:
    """Read sources in order until there is enough text.

    :param sources: Top-level modules, or the names of parts of the standard library.
    :param max_chars: The size at which to stop.
    :param stages: Shows progress.

    :returns: The corpus.
    """
    corpus = Corpus()

    for source in sources:
        if source == TOPICS:
            readers = [read_topics()]
        else:
            readers = [read_docstrings(m, f) for m, f in list_files(source)]

        with stages.start(f"Reading documentation of {source}", len(readers)) as step:
            for entry in _chain(step.over(readers)):
                corpus.add(entry)

                if corpus.num_chars >= max_chars:
                    return corpus

    return corpus


def choose_split(text: str) -> str:
    """Choose a split by a hash of the letters of a document.

    :param text: The document.

    :returns: ``train``, ``valid`` or ``test``.
    """
    fraction = hash_fraction(text, "split")

    if fraction < HELD_OUT_FRACTION:
        return "valid"

    return "test" if fraction < 2 * HELD_OUT_FRACTION else "train"


def _chain(readers: Iterator[Iterator[DocEntry]]) -> Iterator[DocEntry]:
    for reader in readers:
        yield from reader
