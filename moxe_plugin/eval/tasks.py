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
from typing import Any, Final

from datasets import Dataset, load_dataset

from moxe_plugin.data.corpus import EmbeddedSize, prepare_embedded

_LAMBADA: Final = "EleutherAI/lambada_openai"
_GSM8K: Final = "openai/gsm8k"

_FINEWEB_EDU: Final = "HuggingFaceFW/fineweb-edu"
# Training reads the 10-billion-token sample from its first file on; this is its last.
_FINEWEB_EDU_FILE: Final = "sample/10BT/013_00000.parquet"

_SENTENCE_END: Final = re.compile(r"(?<=\S )[A-Za-z]{3,}(?=[.!?](\s|$))")
_WORD: Final = re.compile(r"\S+\s*")
_MIN_CONTEXT_WORDS: Final = 20
_MAX_CONTEXT_WORDS: Final = 50


def load_embedded_documents(
    max_bytes: int, size: EmbeddedSize, **_ignored: object
) -> dict[str, Dataset]:
    """Load documents of the embedded corpus that no model has trained on.

    The test split in the order of a hash; each document that fits the rest of
    ``max_bytes``.

    :param max_bytes: The most bytes of text in UTF-8.
    :param size: Which embedded corpus.
    :param _ignored: What the harness passes to every task.

    :returns: Documents with the field ``text``.
    """
    texts = []
    room = max_bytes

    for text in sorted(_read_embedded_texts(size), key=_hash):
        num_bytes = len(text.encode())
        if num_bytes <= room:
            room -= num_bytes
            texts.append(text)

    return _as_test_split({"text": text} for text in texts)


def load_embedded_last_words(
    max_passages: int, size: EmbeddedSize, **_ignored: object
) -> dict[str, Dataset]:
    """Load passages of the embedded corpus whose last word is to be predicted.

    :param max_passages: The most passages, in the order of a hash.
    :param size: Which embedded corpus.
    :param _ignored: What the harness passes to every task.

    :returns: Documents with the fields ``context`` and ``word``.
    """
    passages = {p for text in _read_embedded_texts(size) for p in find_last_words(text)}

    chosen = sorted(passages, key=lambda p: _hash(" ".join(p)))[:max_passages]

    return _as_test_split({"context": c, "word": w} for c, w in chosen)


def find_last_words(text: str) -> list[tuple[str, str]]:
    """Find the words that end a sentence, and what comes before them.

    A word qualifies if it has at least three letters, nothing else, follows a single
    space, and the document has 20 words before it. Unlike in LAMBADA nobody has checked
    that it can be guessed, and passages of one document overlap.

    :param text: The document.

    :returns: At most 50 words before the space, and the word.
    """
    passages = []

    for match in _SENTENCE_END.finditer(text):
        words = _WORD.findall(text, 0, match.start() - 1)
        if len(words) >= _MIN_CONTEXT_WORDS:
            passages.append(("".join(words[-_MAX_CONTEXT_WORDS:]), match.group()))

    return passages


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


def load_documents(file: str | None = None, **_ignored: object) -> dict[str, Dataset]:
    """Load documents of a file.

    :param file: JSON lines with the field ``text``.
    :param _ignored: What the harness passes to every task.

    :returns: Documents with the field ``text``.

    :raises ValueError: There is no file.
    """
    if file is None:
        raise ValueError(
            "`file` must be given, as in `--metadata file=valid.jsonl`: JSON lines "
            "with the field `text`."
        )

    return _as_test_split({"text": text} for text in _read_texts(Path(file)))


def load_gsm8k(file: str | None = None, **_ignored: object) -> dict[str, Dataset]:
    """Load the test questions of GSM8K.

    :param file: A local copy, JSON lines with the fields ``question`` and ``answer``;
        downloaded if ``None``.
    :param _ignored: What the harness passes to every task.

    :returns: Documents with the fields ``question`` and ``answer``.
    """
    if file is None:
        return {"test": load_dataset(_GSM8K, "main", split="test")}

    with Path(file).open(encoding="utf-8") as fp:
        rows = [json.loads(line) for line in fp]

    return _as_test_split(
        {"question": row["question"], "answer": row["answer"]} for row in rows
    )


def load_multiple_choice(
    file: str | None = None,
    max_choice_chars: int | None = None,
    **_ignored: object,
) -> dict[str, Dataset]:
    """Load questions with several answers.

    :param file: JSON lines with the fields ``query``, ``choices`` and ``gold``, the
        index of the right choice.
    :param max_choice_chars: Leave questions out that have a longer choice, as one of
        more tokens than a model can read has no score; ``None`` keeps all.
    :param _ignored: What the harness passes to every task.

    :returns: Documents with the fields ``query``, ``choices`` and ``gold``.

    :raises ValueError: There is no file, or one of its lines is not a question.
    """
    if file is None:
        raise ValueError(
            "`file` must be given, as in `--metadata file=piqa.jsonl`: JSON lines with "
            "the fields `query`, `choices` and `gold`."
        )

    questions = _read_questions(Path(file))

    if max_choice_chars is None:
        return _as_test_split(questions)

    return _as_test_split(
        question
        for question in questions
        if all(len(choice) <= max_choice_chars for choice in question["choices"])
    )


def _read_questions(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as fp:
        for number, line in enumerate(fp, start=1):
            try:
                row = json.loads(line)
                query, choices, gold = row["query"], row["choices"], row["gold"]
                _ = choices[gold]
            except (ValueError, KeyError, TypeError, IndexError) as ex:
                raise ValueError(
                    f"'{file}', line {number}: must be a JSON object with `query`, "
                    "`choices` and `gold`, the index of one of the choices."
                ) from ex

            yield {"query": query, "choices": choices, "gold": gold}


def _read_embedded_texts(size: EmbeddedSize) -> Iterator[str]:
    return _read_texts(prepare_embedded(size).test_jsonl)


def _read_texts(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as fp:
        for line in fp:
            yield json.loads(line)["text"]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _as_test_split(rows: Iterable[dict[str, Any]]) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(list(rows))}
