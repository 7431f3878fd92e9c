"""Tests of moxe_plugin/routing_page/pieces.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import final

import pytest
from fairseq2.data.tokenizers import TokenDecoder
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from typing_extensions import override

from moxe_plugin.data.bpe import train_bpe
from moxe_plugin.data.tokenizer import HgTextTokenizerConfig, load_hg_text_tokenizer
from moxe_plugin.routing_page.pieces import (
    Piece,
    Run,
    lay_out,
    show_plainly,
    split_runs,
    split_text,
)
from tests.common import ByteTokenizer


@final
class _PieceDecoder(TokenDecoder):
    """Decodes as SentencePiece does: the space of the first token is dropped."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self._vocabulary = vocabulary

    @override
    def __call__(self, token_indices: Tensor) -> str:
        tokens = [self._vocabulary[i] for i in token_indices.tolist()]

        return self.decode_from_tokens(tokens)

    @override
    def decode_from_tokens(self, tokens: Sequence[str]) -> str:
        return "".join(tokens).replace("▁", " ").removeprefix(" ")


def _split_bytes(text: str) -> list[Piece]:
    tokenizer = ByteTokenizer()
    token_ids = tokenizer.create_raw_encoder()(text).tolist()

    return split_text(tokenizer.create_decoder(), token_ids)


def test_the_first_token_of_a_split_character_shows_it() -> None:
    assert _split_bytes("aé日b") == [
        Piece("a", 0),
        Piece("é", 1),
        Piece("", 1),
        Piece("日", 3),
        Piece("", 3),
        Piece("", 3),
        Piece("b", 6),
    ]


@given(st.text(st.characters(codec="utf-8"), min_size=1))
def test_pieces_joined_are_the_text(text: str) -> None:
    pieces = _split_bytes(text)

    assert "".join(piece.text for piece in pieces) == text
    assert all(pieces[piece.owner].text for piece in pieces)
    assert [p.owner for p in pieces if p.text] == [
        idx for idx, p in enumerate(pieces) if p.text
    ]


def test_a_cut_character_is_shown_as_unknown() -> None:
    cut = "é".encode()[:1]

    assert split_text(ByteTokenizer().create_decoder(), [97, *cut]) == [
        Piece("a", 0),
        Piece("\N{REPLACEMENT CHARACTER}", 1),
    ]


def test_the_space_before_a_word_is_kept() -> None:
    decoder = _PieceDecoder(["▁a", "▁word", "s"])

    pieces = split_text(decoder, [0, 1, 2, 1])

    assert [piece.text for piece in pieces] == ["a", " word", "s", " word"]


def test_bpe_tokens_show_their_text_and_special_tokens_their_name(
    tmp_path: Path,
) -> None:
    train_bpe(["low lower lowest"] * 9, 270, tmp_path)
    tokenizer = load_hg_text_tokenizer(tmp_path, HgTextTokenizerConfig())
    text = "lower <|endoftext|> 日 .\n"

    token_ids = tokenizer.create_raw_encoder()(text).tolist()
    pieces = split_text(tokenizer.create_decoder(), token_ids)

    assert "".join(piece.text for piece in pieces) == text
    assert pieces[token_ids.index(0)].text == "<|endoftext|>"
    assert len(pieces) < len(text)


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        ("ab c", [Run("text", "ab"), Run("space", " "), Run("text", "c")]),
        ("\t\n", [Run("tab", "\t"), Run("newline", "\n")]),
        ("\0", [Run("sign", "U+0000", "U+0000")]),
        ("\u202e", [Run("sign", "U+202E", "RIGHT-TO-LEFT OVERRIDE")]),
        ("\u2028", [Run("sign", "U+2028", "LINE SEPARATOR")]),
        ("\u00a0", [Run("space", "\u00a0")]),
        ("é日🙂<", [Run("text", "é日🙂<")]),
    ],
)
def test_characters_without_shape_get_a_sign(text: str, runs: list[Run]) -> None:
    assert split_runs(text) == runs


def test_plain_text_has_one_line() -> None:
    assert show_plainly("a\tb\r\nc\u200b") == "a→b⟨U+000D⟩↵c⟨U+200B⟩"


def test_lines_break_before_words_and_after_line_ends() -> None:
    texts = ["a", " wo", "rd", " x", "\n", "longword", "s", ""]
    pieces = [Piece(text, idx) for idx, text in enumerate(texts)]

    lines = lay_out(pieces, 6, len)

    assert ["".join(token.text for token in line) for line in lines] == [
        "a word",
        " x↵",
        "longword",
        "s▫",
    ]
    assert [token.idx for line in lines for token in line] == list(range(8))
    assert [[token.column for token in line] for line in lines] == [
        [0, 1, 4],
        [0, 2],
        [0],
        [0, 1],
    ]


def test_a_word_moves_as_a_whole() -> None:
    pieces = [Piece(text, idx) for idx, text in enumerate([" on", " two", "some", "s"])]

    lines = lay_out(pieces, 9, len)

    assert ["".join(token.text for token in line) for line in lines] == [
        " on",
        " twosomes",
    ]
    assert [token.column for token in lines[1]] == [0, 4, 8]
