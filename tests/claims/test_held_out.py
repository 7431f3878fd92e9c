"""The texts that runs are measured on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from moxe_plugin.claims.held_out import rarity_bins, read_documents, read_passages


def _encode(text: str) -> list[int]:
    return list(text.encode())


def _write(file: Path, texts: Sequence[str]) -> Path:
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))

    return file


def test_documents_are_cut_and_short_ones_left_out(tmp_path: Path) -> None:
    file = _write(tmp_path / "text.jsonl", ["a" * 100, "b" * 63, "c" * 64])

    documents = read_documents(file, _encode, 80)

    assert [len(ids) for ids in documents.token_ids] == [80, 64]
    assert documents.token_ids[1].tolist() == [ord("c")] * 64


@pytest.mark.parametrize(
    ("texts", "max_tokens"), [(["a" * 100], 80), (["a" * 99] * 2, 10)]
)
def test_too_little_text_is_an_error(
    tmp_path: Path, texts: Sequence[str], max_tokens: int
) -> None:
    file = _write(tmp_path / "text.jsonl", texts)

    with pytest.raises(ValueError, match="must have at least two documents of 64"):
        read_documents(file, _encode, max_tokens)


def test_passages_end_with_a_word_that_begins_with_its_space(tmp_path: Path) -> None:
    file = _write(tmp_path / "lambada.jsonl", ["the last word", "one", "two words"])

    passages = read_passages(file, _encode, 10)

    decoded = {
        (bytes(context).decode(), bytes(word).decode())
        for context, word in passages.pairs
    }
    assert decoded == {("the last", " word"), ("two", " words")}


def test_passages_are_chosen_whatever_their_order(tmp_path: Path) -> None:
    texts = [f"passage number {i}" for i in range(20)]

    chosen = read_passages(_write(tmp_path / "a.jsonl", texts), _encode, 5)
    reverse = read_passages(_write(tmp_path / "b.jsonl", texts[::-1]), _encode, 5)

    assert len(chosen.pairs) == 5
    assert chosen.pairs == reverse.pairs


def test_rarity_bins_hold_equal_shares_of_the_text() -> None:
    # Token 2 is half of the text; then 0, 3, 1 and, never seen, 4.
    counts = np.array([30, 5, 50, 15, 0])

    # Middles: 2 at 0.25, 0 at 0.65, 3 at 0.875, 1 at 0.975, 4 at 1.
    assert rarity_bins(counts, 4).tolist() == [2, 3, 1, 3, 3]


def test_rarity_bins_of_many_tokens_are_even() -> None:
    bins = rarity_bins(np.full(1000, 7), 10)

    assert np.bincount(bins).tolist() == [100] * 10
