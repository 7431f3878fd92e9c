"""Tests of the index of n-grams."""

from __future__ import annotations

import random

import pytest

from moxe_plugin.data.ngrams import NgramIndex, split_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don\u2019t stop,  he said.", ["don", "t", "stop", "he", "said"]),
        ("don't STOP\u2014he_said", ["don", "t", "stop", "he", "said"]),
        ("Stra\u00dfe \ufb01n\u00e9 \uff21\uff11", ["strasse", "fin\u00e9", "a1"]),
        ("cafe\u0301", ["caf\u00e9"]),
        ("... \n\t", []),
    ],
    ids=["typographic", "plain", "folded", "composed", "no_words"],
)
def test_words_are_runs_of_letters_and_digits_without_case(
    text: str, words: list[str]
) -> None:
    assert split_words(text) == words


def _ngrams(text: str, size: int) -> list[tuple[str, ...]]:
    words = split_words(text)

    return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_counts_are_those_of_sets_of_tuples(size: int) -> None:
    rng = random.Random(size)

    def make(length: int, alphabet: str) -> str:
        return " ".join(rng.choice(alphabet) for _ in range(length))

    items = [
        [make(rng.randrange(12), "abcdef") for _ in range(rng.randrange(1, 4))]
        for _ in range(60)
    ]
    texts = [make(rng.randrange(30), "abcdexyz") for _ in range(25)]

    index = NgramIndex(items, size)
    num_texts, num_words = index.search(texts)

    searched = {n for t in texts for n in _ngrams(t, size)}
    ngrams = [[n for t in item for n in _ngrams(t, size)] for item in items]
    found = [[n for n in item if n in searched] for item in ngrams]

    assert (num_texts, num_words) == (25, sum(len(t.split()) for t in texts))
    assert index.count_ngrams().tolist() == [len(n) for n in ngrams]
    assert index.count_found().tolist() == [len(n) for n in found]
    assert 0 < sum(map(len, found)) < sum(map(len, ngrams))

    for item, item_found in enumerate(found):
        if item_found:
            assert index.first_found(item) == " ".join(item_found[0])
        else:
            with pytest.raises(ValueError, match=rf"\({item}\) was found"):
                index.first_found(item)


def test_long_text_is_searched_in_pieces_without_a_seam() -> None:
    words = [f"w{i}" for i in range(70_000)]
    index = NgramIndex([[" ".join(words[i : i + 13])] for i in range(0, 69_987)], 13)

    # The piece ends with a text, so no n-gram of a text is cut.
    index.search([" ".join(words[:40_000]), " ".join(words[40_000:]), words[0]])

    assert index.count_found().sum() == 69_987 - 12


def test_index_without_a_long_item_finds_nothing() -> None:
    index = NgramIndex([["a b"], []], 3)

    assert index.search(["a b c"]) == (1, 3)
    assert index.count_ngrams().tolist() == [0, 0]
    assert index.count_found().tolist() == [0, 0]


def test_ngram_of_no_words_is_refused() -> None:
    with pytest.raises(ValueError, match="`size` must be positive, but is 0"):
        NgramIndex([["a"]], 0)
