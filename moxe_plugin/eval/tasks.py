"""The documents of the tasks in ``eval_tasks/``.

The harness calls each ``load_*`` function with the ``metadata`` of the task's YAML,
the arguments of the model and what ``--metadata`` adds; ``_ignored`` takes what is not
for us. Each returns the split ``test``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from datasets import Dataset, load_dataset

_LAMBADA: Final = "EleutherAI/lambada_openai"

_FINEWEB_EDU: Final = "HuggingFaceFW/fineweb-edu"
# Training reads the 10-billion-token sample from its first file on; this is its last.
_FINEWEB_EDU_FILE: Final = "sample/10BT/013_00000.parquet"

_LAST_WORD: Final = re.compile(
    r"(?P<context>.*\S) (?P<word>[A-Za-z]{3,})\W*", re.DOTALL
)
_MIN_WORDS: Final = 30
_MAX_WORDS: Final = 120


def load_embedded_documents(max_bytes: int, **_ignored: object) -> dict[str, Dataset]:
    """Load documents of the embedded corpus that no model has trained on.

    The test split in the order of a hash; each document that fits the rest of
    ``max_bytes``.

    :param max_bytes: The most bytes of text in UTF-8.
    :param _ignored: What the harness passes to every task.

    :returns: Documents with the field ``text``.
    """
    texts = []
    room = max_bytes

    for text in sorted(_read_embedded_texts(), key=_hash):
        num_bytes = len(text.encode())
        if num_bytes <= room:
            room -= num_bytes
            texts.append(text)

    return _as_test_split({"text": text} for text in texts)


def load_embedded_last_words(
    max_passages: int, **_ignored: object
) -> dict[str, Dataset]:
    """Load passages of the embedded corpus whose last word is to be predicted.

    :param max_passages: The most passages, in the order of a hash.
    :param _ignored: What the harness passes to every task.

    :returns: Documents with the fields ``context`` and ``word``.
    """
    passages = {
        passage
        for text in _read_embedded_texts()
        for paragraph in text.split("\n\n")
        if (passage := find_last_word(paragraph)) is not None
    }

    chosen = sorted(passages, key=lambda p: _hash(" ".join(p)))[:max_passages]

    return _as_test_split({"context": c, "word": w} for c, w in chosen)


def find_last_word(paragraph: str) -> tuple[str, str] | None:
    """Cut off the last word of a paragraph, if it can be guessed from the rest.

    As in LAMBADA, most of whose last words occur in the passage: the word has at least
    three letters and occurs earlier, whatever its case. It follows a space, and the
    punctuation behind it is dropped. A paragraph of 30 to 120 words qualifies; an
    interpreter session does not.

    :param paragraph: The paragraph.

    :returns: The text before the space, and the word; or ``None``.
    """
    paragraph = paragraph.strip()

    if not _MIN_WORDS <= len(paragraph.split()) <= _MAX_WORDS or ">>>" in paragraph:
        return None

    match = _LAST_WORD.fullmatch(paragraph)
    if match is None:
        return None

    context, word = match["context"], match["word"]
    earlier_words = re.findall("[a-z]+", context.lower())

    return (context, word) if word.lower() in earlier_words else None


def load_lambada(file: str | None = None, **_ignored: object) -> dict[str, Dataset]:
    """Load LAMBADA in OpenAI's version.

    :param file: A local copy, JSON lines with the field ``text``; downloaded if
        ``None``.
    :param _ignored: What the harness passes to every task.

    :returns: Documents with the field ``text``.
    """
    if file is not None:
        return _as_test_split({"text": text} for text in _read_texts(Path(file)))

    return {"test": load_dataset(_LAMBADA, "default", split="test")}


def load_fineweb_edu(
    max_documents: int, file: str | None = None, **_ignored: object
) -> dict[str, Dataset]:
    """Load documents of FineWeb-Edu's 10-billion-token sample.

    :param max_documents: The number of documents, from the beginning of the last file.
    :param file: A local copy, JSON lines with the field ``text``; downloaded if
        ``None``.
    :param _ignored: What the harness passes to every task.

    :returns: Documents with the field ``text``.
    """
    texts: Iterable[str]

    if file is not None:
        texts = _read_texts(Path(file))
    else:
        stream = load_dataset(
            _FINEWEB_EDU, data_files=_FINEWEB_EDU_FILE, split="train", streaming=True
        )
        texts = (row["text"] for row in stream)

    return _as_test_split(
        {"text": text} for _, text in zip(range(max_documents), texts, strict=False)
    )


def _read_embedded_texts() -> Iterator[str]:
    from moxe_plugin.data.corpus import prepare_embedded

    return _read_texts(Path(prepare_embedded().test_jsonl))


def _read_texts(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as fp:
        for line in fp:
            yield json.loads(line)["text"]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _as_test_split(rows: Iterable[dict[str, str]]) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(list(rows))}
