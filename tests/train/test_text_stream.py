"""Streams text whose characters are spread over tokens."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from moxe_plugin.train.generate.text_stream import TextStream
from tests.common import ByteTokenizer

_DECODE = ByteTokenizer().create_decoder()


def _stream(tokens: Iterable[int]) -> list[str]:
    stream = TextStream(_DECODE)

    pieces = [stream.push(token) for token in tokens]
    pieces.append(stream.finish())

    assert stream.text == "".join(pieces)

    return pieces


@pytest.mark.parametrize("text", ["abc", "né", "1 €", "a 😀 b", "日本語", ""])
def test_pieces_are_whole_characters(text: str) -> None:
    pieces = _stream(text.encode())

    assert "".join(pieces) == text
    # A character comes with its last byte, not before and not later.
    assert [p for p in pieces if p] == list(text)


@pytest.mark.parametrize(
    "tokens",
    [b"a\xe2\x82", b"\xff", b"\xe2\x82a\xe2\x82\xac", b"\xf0\x9f\x98", b"\xc3\xc3\xa9"],
    ids=["cut_off", "never_valid", "then_valid", "three_of_four", "twice"],
)
def test_text_is_that_of_the_whole_sequence(tokens: bytes) -> None:
    expected = _DECODE(torch.tensor(list(tokens)))

    assert "\N{REPLACEMENT CHARACTER}" in expected
    assert "".join(_stream(tokens)) == expected
