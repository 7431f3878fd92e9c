"""Makes instructions from documentation: what something is, answered in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, NamedTuple

from moxe_plugin.data.cleaning import (
    Cleaner,
    compute_digest,
    find_first_sentence,
    hash_fraction,
    is_english,
    split_paragraphs,
)
from moxe_plugin.data.documentation import DocEntry

VALID_FRACTION: Final = 0.1
"""The share of held-out questions among those about text outside the corpus."""

MIN_ANSWER_CHARS: Final = 24
MAX_ANSWER_CHARS: Final = 300
MAX_SIGNATURE_CHARS: Final = 60


class Question(NamedTuple):
    """A question about one piece of documentation."""

    src: str
    """The question."""

    tgt: str
    """The answer."""

    split: str | None
    """The split of the documentation, if it is in the corpus."""

    paragraph: str
    """The paragraph the answer is taken from."""


class QuestionCollector:
    """Collects questions whose answers differ.

    Held-out questions are about documentation of the held-out splits, or about
    documentation that is not in the corpus at all, such as docstrings of one line.
    """

    def __init__(self) -> None:
        self._questions: list[Question] = []
        self._seen: set[bytes] = set()

    def add(self, entry: DocEntry, split: str | None) -> None:
        """Add the question about an entry, if its documentation begins with an answer.

        :param entry: The documentation.
        :param split: The split it is in, if it is in the corpus.
        """
        paragraphs = split_paragraphs(entry.text)

        if not paragraphs:
            return

        answer = _make_answer(entry, paragraphs[0])

        if answer is None:
            return

        digest = compute_digest(answer)

        if digest not in self._seen:
            self._seen.add(digest)
            question = Question(_make_question(entry), answer, split, paragraphs[0])
            self._questions.append(question)

    def write(
        self, output_dir: Path, cleaner: Cleaner, max_train: int, max_valid: int
    ) -> dict[str, int]:
        """Write ``train.jsonl`` and ``valid.jsonl``.

        :param output_dir: The directory to make.
        :param cleaner: Knows every paragraph of the corpus.
        :param max_train: The number of training questions at most.
        :param max_valid: The number of held-out questions at most.

        :returns: The number of questions by split.
        """
        splits: dict[str, list[Question]] = {"train": [], "valid": []}

        for question in self._questions:
            if question.split is None:
                is_valid = hash_fraction(question.tgt, "split") < VALID_FRACTION

                # A paragraph of another document of the corpus.
                if is_valid and cleaner.has_seen(question.paragraph):
                    continue
            else:
                is_valid = question.split != "train"

            splits["valid" if is_valid else "train"].append(question)

        output_dir.mkdir()
        counts = {}

        for split, max_num in (("train", max_train), ("valid", max_valid)):
            questions = splits[split]
            questions.sort(key=lambda q: hash_fraction(q.tgt, "order"))

            lines = [
                json.dumps({"src": q.src, "tgt": q.tgt}) + "\n"
                for q in questions[:max_num]
            ]

            file = output_dir / f"{split}.jsonl"
            file.write_text("".join(lines), encoding="utf-8")
            counts[split] = len(lines)

        return counts


def _make_question(entry: DocEntry) -> str:
    match entry.kind:
        case "function":
            signature = entry.signature

            if len(signature) > MAX_SIGNATURE_CHARS:
                signature = "(...)"

            return f"What does `{entry.name}{signature}` do?\n"
        case "class":
            return f"What is `{entry.name}`?\n"
        case "module":
            return f"What is the module `{entry.name}` for?\n"
        case "topic":
            return f"What does the Python reference say about {entry.name}?\n"


def _make_answer(entry: DocEntry, paragraph: str) -> str | None:
    answer: str | None

    if entry.kind == "topic":
        answer = " ".join(paragraph.split())
    else:
        answer = find_first_sentence(paragraph)

    if answer is None or not is_english(answer):
        return None

    return answer if MIN_ANSWER_CHARS <= len(answer) <= MAX_ANSWER_CHARS else None
