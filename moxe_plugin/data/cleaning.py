"""Turns documentation into prose: drops code, tables, duplicates, other languages."""

from __future__ import annotations

import re
from hashlib import sha256
from inspect import cleandoc
from typing import Final

MIN_DOCUMENT_WORDS: Final = 20
MIN_LETTERS: Final = 0.72
"""The share of letters and spaces in a paragraph of prose."""

MIN_FUNCTION_WORDS: Final = 0.12
"""The share of words that nearly every English sentence has some of."""

MAX_NON_ASCII: Final = 0.02
"""The share of other characters."""

_FUNCTION_WORDS: Final = frozenset(
    """
    a an and are as at be been but by can for from has have if in into is it its may
    must no not of on or should so such than that the their then there these this to
    was when which will with would you
    """.split()  # noqa: SIM905  # a list of literals reads worse
)

_WORD: Final = re.compile(r"[A-Za-z']+")
_NOT_WORD: Final = re.compile(r"[\W\d_]+")
_NOT_LETTER: Final = re.compile(r"[^A-Za-z ]")
_ADORNMENT: Final = re.compile(r"^\W{3,}$", re.MULTILINE)
_DIRECTIVE: Final = re.compile(r"^\s*(\.\. \S.*|:\w+:.*)$", re.MULTILINE)
_ROLE: Final = re.compile(r":[\w:.-]+:(?=`)")
_ABBREVIATIONS: Final = ("e.g.", "i.e.", " eg.", " ie.", "etc.", "cf.", "vs.")
_SPACES: Final = re.compile(r"(?<=\S)[ \t]{2,}")


class Cleaner:
    """Cleans documents one after the other, each paragraph kept once.

    Packages copy their documentation a lot: a paragraph whose letters were seen before
    is dropped, so no text of one split comes up in another.
    """

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def clean(self, text: str) -> str | None:
        """Clean a document.

        :param text: The document.

        :returns: Its prose, or ``None`` if hardly any is left.
        """
        paragraphs = []
        digests = set()

        for paragraph in split_paragraphs(text):
            digest = compute_digest(paragraph)

            if digest in self._seen or digest in digests:
                continue

            digests.add(digest)
            paragraphs.append(paragraph)

        output = "\n\n".join(paragraphs)

        if len(output.split()) < MIN_DOCUMENT_WORDS or not is_english(output):
            return None

        self._seen |= digests

        return output

    def has_seen(self, paragraph: str) -> bool:
        """Tell whether a paragraph is in a document that was kept.

        :param paragraph: The paragraph.

        :returns: The answer.
        """
        return compute_digest(paragraph) in self._seen


def split_paragraphs(text: str) -> list[str]:
    """Split a document into paragraphs and keep those that are prose.

    :param text: The document.

    :returns: The paragraphs.
    """
    text = cleandoc(text).replace("``", "`")

    # A paragraph begins where the line before is blank.
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)

    output = []

    for paragraph in re.split(r"\n{2,}", text):
        if ">>>" in paragraph:
            continue

        for pattern in (_ADORNMENT, _DIRECTIVE):
            paragraph = pattern.sub("", paragraph)

        paragraph = _SPACES.sub(" ", _ROLE.sub("", paragraph)).strip("\n")
        paragraph = re.sub(r"\n\n+", "\n", paragraph)

        if _is_prose(paragraph):
            output.append(paragraph)

    return output


def is_english(text: str) -> bool:
    """Tell whether a text looks like English prose.

    :param text: The text.

    :returns: The answer.
    """
    words = [w.lower() for w in _WORD.findall(text)]

    num_function_words = sum(w in _FUNCTION_WORDS for w in words)
    num_non_ascii = len(text) - len(text.encode("ascii", "ignore"))

    return num_function_words >= MIN_FUNCTION_WORDS * max(
        len(words), 1
    ) and num_non_ascii <= MAX_NON_ASCII * len(text)


def compute_digest(text: str) -> bytes:
    """Hash the letters of a text: case, digits, space and punctuation do not count.

    :param text: The text.

    :returns: 16 bytes.
    """
    letters = _NOT_WORD.sub(" ", text).strip().lower()

    return sha256(letters.encode()).digest()[:16]


def hash_fraction(text: str, salt: str) -> float:
    """Draw a number from a text, the same for texts with equal letters.

    :param text: The text.
    :param salt: Makes draws for different purposes independent.

    :returns: A number in [0, 1).
    """
    digest = sha256(salt.encode() + compute_digest(text)).digest()

    return int.from_bytes(digest[:6], "big") / float(1 << 48)


def find_first_sentence(text: str) -> str | None:
    """Find the first sentence of a document.

    :param text: The document.

    :returns: The sentence on one line, or ``None`` if it does not read as one.
    """
    paragraph = " ".join(text.split("\n\n", 1)[0].split()).replace("``", "`")

    match = re.match(r"[A-Z][^\n]*?[a-z0-9)`'\"]\.(?=\s|$)", _ROLE.sub("", paragraph))

    if match is None or match.group().endswith(_ABBREVIATIONS):
        return None

    return match.group()


def _is_prose(paragraph: str) -> bool:
    if not paragraph.strip():
        return False

    num_others = len(_NOT_LETTER.findall(paragraph))

    return num_others <= (1.0 - MIN_LETTERS) * len(paragraph)
