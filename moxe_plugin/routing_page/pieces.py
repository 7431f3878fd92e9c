"""From token ids back to the text of each token, and what stands for odd characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple
from unicodedata import category, name

import torch
from fairseq2.data.tokenizers import TokenDecoder

PART_SIGN: Final = "▫"
"""Stands for a token whose characters an earlier token shows."""

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"

# They would reorder or hide the text around them.
_TREACHEROUS: Final = frozenset(
    "\u00ad\u061c\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067"
    "\u2068\u2069\ufeff"
)


class Piece(NamedTuple):
    """What of the text a token shows."""

    text: str
    """Its characters, those included that later tokens complete; may be empty."""

    owner: int
    """The token that shows the characters of this one: itself, or an earlier one."""


class Run(NamedTuple):
    """Characters that are shown in one way."""

    kind: str
    """``text``, ``space``, ``tab``, ``newline``, or ``sign`` for what has no shape."""

    text: str
    """The characters; of a ``sign``, its code point."""

    title: str = ""
    """What a ``sign`` is."""


def split_text(decoder: TokenDecoder, token_ids: Sequence[int]) -> list[Piece]:
    """Find the characters of each token.

    A byte-level tokenizer may split a character: the first of its tokens shows it, the
    others show nothing.

    :param decoder: Decodes without dropping special tokens.
    :param token_ids: The text.

    :returns: One piece for each token; their texts joined are the decoded text.
    """

    def decode(begin: int, end: int) -> str:
        return decoder(torch.tensor(token_ids[begin:end], dtype=torch.int64))

    pieces: list[Piece] = []
    context, begin = 0, 0

    for end in range(1, len(token_ids) + 1):
        # Behind the token before it, since decoders strip the space of a first token.
        text = decode(context, end)[len(decode(context, begin)) :]

        if text.endswith(_REPLACEMENT) and end < len(token_ids):
            continue

        pieces.append(Piece(text, begin))
        pieces += [Piece("", begin)] * (end - begin - 1)
        context, begin = begin, end

    return pieces


def split_runs(text: str) -> list[Run]:
    """Split text by how its characters are shown.

    :param text: The text.

    :returns: The runs; all but those of kind ``sign`` hold the text itself.
    """
    runs: list[Run] = []

    for char in text:
        run = _classify(char)

        if runs and run.kind == runs[-1].kind == "text":
            runs[-1] = Run("text", runs[-1].text + char)
        else:
            runs.append(run)

    return runs


def _classify(char: str) -> Run:
    if char == "\n":
        return Run("newline", char)

    if char == "\t":
        return Run("tab", char)

    kind = category(char)

    if kind == "Zs":
        return Run("space", char)

    if kind in ("Cc", "Zl", "Zp", "Cn", "Co") or char in _TREACHEROUS:
        code = f"U+{ord(char):04X}"

        return Run("sign", code, name(char, code))

    return Run("text", char)


def show_plainly(text: str) -> str:
    """Replace what plain text cannot show: line ends, tabs, characters without shape.

    :param text: The text.

    :returns: A single line.
    """
    signs = {"newline": "↵", "tab": "→", "space": " "}

    return "".join(
        f"⟨{run.text}⟩" if run.kind == "sign" else signs.get(run.kind, run.text)
        for run in split_runs(text)
    )


class Placed(NamedTuple):
    """A token in a layout of fixed-width characters."""

    idx: int
    """Which token."""

    text: str
    """What is shown."""

    column: int
    """Where it begins."""

    width: int
    """The number of columns it takes."""


def lay_out(
    pieces: Sequence[Piece], width: int, measure: Callable[[str], int]
) -> list[list[Placed]]:
    """Arrange tokens in lines, broken before words where possible.

    :param pieces: The tokens.
    :param width: The number of columns.
    :param measure: Returns the number of columns of a string.

    :returns: The tokens of each line.
    """
    lines: list[list[Placed]] = [[]]
    column, word_begin = 0, 0

    for idx, piece in enumerate(pieces):
        text = show_plainly(piece.text) or PART_SIGN
        size = measure(text)
        line = lines[-1]

        if piece.text[:1].isspace():
            word_begin = len(line)

        if line and column + size > width:
            # A word that fills a line by itself is broken where the line ends.
            moved = line[word_begin:] if word_begin > 0 else []
            del line[len(line) - len(moved) :]
            lines.append([])
            column, word_begin = 0, 0

            for old in moved:
                lines[-1].append(old._replace(column=column))
                column += old.width

        lines[-1].append(Placed(idx, text, column, size))
        column += size

        if piece.text.endswith("\n"):
            lines.append([])
            column, word_begin = 0, 0

    return [line for line in lines if line]
