"""The file ``overlap.json``: how much of each evaluation text is in a training text.

Needs neither torch nor fairseq2, so that ``report`` can read it. The file, written by
``moxe data overlap``, is one JSON object::

    {
      "schema_version": 1,
      "ngram_size": 13,               words in an n-gram
      "train": {
        "files": [{"file": "train.jsonl", "sha256": "..."}],
        "num_documents": 3000,
        "num_words": 3100000
      },
      "evals": {
        "lambada_openai": {           one entry per evaluation set
          "files": [{"file": "lambada_test.jsonl", "sha256": "..."}],
          "num_items": 5153,
          "num_short_items": 0,       no text of theirs has `ngram_size` words
          "num_overlapping_items": 2, with an n-gram that the training text has
          "num_ngrams": 340000,       of all items, repetitions included
          "num_overlapping_ngrams": 9,
          "worst": [                  items with the largest share of n-grams found
            {
              "item": 17,             counted from 1, in the order of the files
              "num_ngrams": 60,
              "num_overlapping_ngrams": 7,
              "ngram": "the first words that both have"
            }
          ]
        }
      }
    }

The ``sha256`` of a directory of token shards is that of its manifest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

OVERLAP_FILE: Final = "overlap.json"
SCHEMA_VERSION: Final = 1


@dataclass(kw_only=True)
class SourceFile:
    """A file that was compared."""

    file: str
    """Its path, as the command named it."""

    sha256: str
    """Its digest, in hexadecimal."""


@dataclass(kw_only=True)
class TrainText:
    """The training text."""

    files: list[SourceFile]
    """Where it is."""

    num_documents: int
    """The number of documents."""

    num_words: int
    """The number of words."""


@dataclass(kw_only=True)
class OverlapExample:
    """An item that the training text has in part."""

    item: int
    """Its number, from 1, in the order of the files."""

    num_ngrams: int
    """The number of its n-grams."""

    num_overlapping_ngrams: int
    """How many of them the training text has."""

    ngram: str
    """The first of those, as normalised words."""


@dataclass(kw_only=True)
class EvalOverlap:
    """What the training text has of one evaluation set."""

    files: list[SourceFile]
    """Where the items are."""

    num_items: int
    """The number of items."""

    num_short_items: int
    """The number of items none of whose texts is as long as an n-gram; nothing can be
    said about them."""

    num_overlapping_items: int
    """The number of items with an n-gram that the training text has."""

    num_ngrams: int
    """The number of n-grams of all items, repetitions included."""

    num_overlapping_ngrams: int
    """How many of them the training text has."""

    worst: list[OverlapExample]
    """Items with the largest share of n-grams found, the largest first."""

    @property
    def share(self) -> float | None:
        """The overlapping share of the items long enough to tell, in [0, 1]."""
        num_long = self.num_items - self.num_short_items

        return self.num_overlapping_items / num_long if num_long else None


@dataclass(kw_only=True)
class Overlap:
    """The overlap of a training text with evaluation sets."""

    schema_version: int = SCHEMA_VERSION
    """The version of the layout of the file."""

    ngram_size: int
    """The number of words in an n-gram."""

    train: TrainText
    """The training text."""

    evals: dict[str, EvalOverlap]
    """The evaluation sets by name."""

    def to_json(self) -> str:
        """Format the content of the file.

        :returns: The text, with a newline at the end.
        """
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def read_overlap(file: Path) -> Overlap:
    """Read what ``moxe data overlap`` wrote.

    :param file: The file.

    :returns: The overlap.

    :raises FileNotFoundError: There is no such file.
    :raises ValueError: It is damaged, or has another schema version.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        version = data["schema_version"]
    except (ValueError, KeyError, TypeError) as ex:
        raise _damaged(file, f"{type(ex).__name__}: {ex}") from None

    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{file} has schema version {version}, but this version of moxe_plugin "
            f"reads {SCHEMA_VERSION}. Run `moxe data overlap` again."
        )

    try:
        overlap = _parse(data)
    except (KeyError, TypeError, AttributeError) as ex:
        raise _damaged(file, f"{type(ex).__name__}: {ex}") from None

    for name, found in overlap.evals.items():
        num_long = found.num_items - found.num_short_items

        if not (
            0 <= found.num_overlapping_items <= num_long
            and 0 <= found.num_overlapping_ngrams <= found.num_ngrams
        ):
            raise _damaged(file, f"the counts of `{name}` contradict each other")

    return overlap


def format_overlap_note(overlap: Overlap) -> str:
    """Describe an overlap in a sentence, for the notes of a table.

    :param overlap: The overlap.

    :returns: The sentence, without a line break.
    """
    size = overlap.ngram_size
    train = ", ".join(f"{f.file} (sha256 {f.sha256[:12]})" for f in overlap.train.files)
    parts = [_format_eval(name, found) for name, found in overlap.evals.items()]

    return (
        f"Evaluation items that share {size} consecutive words with the training text "
        f"{train}: {'; '.join(parts)}."
    )


def _format_eval(name: str, found: EvalOverlap) -> str:
    num_long = found.num_items - found.num_short_items

    if found.share is None:
        return f"{name}: no item is long enough to tell"

    text = f"{name} {found.num_overlapping_items:,} of {num_long:,} ({found.share:.2%})"

    if found.num_short_items:
        text += f", {found.num_short_items:,} more are too short to tell"

    return text


def _damaged(file: Path, reason: str) -> ValueError:
    return ValueError(
        f"{file} is damaged or not written by `moxe data overlap`: {reason}. Write it "
        "again."
    )


def _parse(data: Mapping[str, Any]) -> Overlap:
    train = data["train"]

    return Overlap(
        ngram_size=_count(data, "ngram_size"),
        train=TrainText(
            files=_parse_files(train),
            num_documents=_count(train, "num_documents"),
            num_words=_count(train, "num_words"),
        ),
        evals={name: _parse_eval(e) for name, e in data["evals"].items()},
    )


def _parse_eval(data: Mapping[str, Any]) -> EvalOverlap:
    return EvalOverlap(
        files=_parse_files(data),
        num_items=_count(data, "num_items"),
        num_short_items=_count(data, "num_short_items"),
        num_overlapping_items=_count(data, "num_overlapping_items"),
        num_ngrams=_count(data, "num_ngrams"),
        num_overlapping_ngrams=_count(data, "num_overlapping_ngrams"),
        worst=[
            OverlapExample(
                item=_count(e, "item"),
                num_ngrams=_count(e, "num_ngrams"),
                num_overlapping_ngrams=_count(e, "num_overlapping_ngrams"),
                ngram=str(e["ngram"]),
            )
            for e in data["worst"]
        ],
    )


def _parse_files(data: Mapping[str, Any]) -> list[SourceFile]:
    return [
        SourceFile(file=str(f["file"]), sha256=str(f["sha256"])) for f in data["files"]
    ]


def _count(data: Mapping[str, Any], key: str) -> int:
    value = data[key]

    if type(value) is not int:
        raise TypeError(f"`{key}` must be an integer, but is {value!r} instead")

    return value
