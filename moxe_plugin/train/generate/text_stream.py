"""Text of tokens that come one at a time."""

from __future__ import annotations

from typing import Final, final

import torch
from fairseq2.data.tokenizers import TokenDecoder

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are no character, or not yet."""


@final
class TextStream:
    """Decodes a sequence piece by piece; the pieces together are its text.

    A piece never ends within a character: the bytes of one may be spread over tokens,
    and wait until the last of them is there.

    :param decode: Decodes a sequence as a whole.
    """

    def __init__(self, decode: TokenDecoder) -> None:
        self._decode = decode
        self._tokens: list[int] = []
        self._text = ""

    @property
    def text(self) -> str:
        """The pieces so far."""
        return self._text

    def push(self, token: int) -> str:
        """Add a token.

        :param token: Its id.

        :returns: The text that became certain, often empty.
        """
        self._tokens.append(token)

        return self._advance(self._decode_all().rstrip(_REPLACEMENT))

    def finish(self) -> str:
        """End the sequence.

        :returns: The rest of the text: bytes that did not become a character.
        """
        return self._advance(self._decode_all())

    def _decode_all(self) -> str:
        return self._decode(torch.tensor(self._tokens, dtype=torch.int64))

    def _advance(self, text: str) -> str:
        # A decoder that changes earlier text, at punctuation say, cannot be followed.
        if not text.startswith(self._text):
            return ""

        piece = text[len(self._text) :]
        self._text = text

        return piece
