"""Finds the n-grams of some texts in others, by words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

_WORD: Final = re.compile(r"[^\W_]+")
_CHUNK_SIZE: Final = 1 << 16
"""The number of words that are looked up at once."""

_SEED: Final = 13
_MULTIPLIER: Final = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that no word of a window is lost in the sum; the golden ratio in bits."""

_GAP: Final = 0
"""Stands between texts, and for words that no indexed text has."""


def split_words(text: str) -> list[str]:
    """Split a text into normalised words.

    Unicode's compatibility form (NFKC), lower case (case folding), and of that the runs
    of letters and digits: punctuation, white space and markup only separate words.

    :param text: The text.

    :returns: The words, in order.
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class NgramIndex:
    """The n-grams of items, and which of them were found in other texts.

    Holds the items' words only, some 40 bytes each, whatever the size of the texts
    that are searched. N-grams are compared by 64-bit hashes: among ``A`` of the items
    and ``B`` searched, a false match has probability ``A * B / 2 ** 64``, which is
    less than one in a million for ``A`` of a million and ``B`` of ten million.

    :param items: The texts of every item; no n-gram crosses from one text to the next.
    :param size: The number of words in an n-gram.

    :raises ValueError: ``size`` is not positive.
    """

    def __init__(self, items: Iterable[Iterable[str]], size: int) -> None:
        if size < 1:
            raise ValueError(f"`size` must be positive, but is {size} instead.")

        self._size = size
        self._ids: dict[str, int] = {}
        self._words: list[str] = [""]

        ids: list[int] = []
        ends: list[int] = []

        for texts in items:
            for text in texts:
                ids.extend(self._add_word(w) for w in split_words(text))
                ids.append(_GAP)

            ends.append(len(ids))

        self._item_ids = np.asarray(ids, dtype=np.int32)
        self._num_items = len(ends)

        rng = np.random.default_rng(_SEED)
        self._codes = rng.integers(
            0, 1 << 64, size=len(self._words), dtype=np.uint64, endpoint=False
        )

        self._starts = self._find_windows(self._item_ids)
        hashes = self._hash_windows(self._item_ids)[self._starts]

        self._hashes, self._ngram_idx = np.unique(hashes, return_inverse=True)
        self._is_found = np.zeros(len(self._hashes), dtype=np.bool_)

        # (W), the item of each window
        self._owners = np.searchsorted(np.asarray(ends), self._starts, side="right")

    def _add_word(self, word: str) -> int:
        idx = self._ids.get(word)

        if idx is None:
            idx = len(self._words)
            self._ids[word] = idx
            self._words.append(word)

        return idx

    def search(self, texts: Iterable[str]) -> tuple[int, int]:
        """Look for the n-grams in texts.

        :param texts: The texts; no n-gram crosses from one to the next.

        :returns: The number of texts and of their words.
        """
        num_texts = num_words = 0
        get = self._ids.get
        ids: list[int] = []

        for text in texts:
            words = split_words(text)
            num_texts += 1
            num_words += len(words)

            ids.extend(get(w, _GAP) for w in words)
            ids.append(_GAP)

            if len(ids) >= _CHUNK_SIZE:
                self._search_chunk(ids)
                ids = []

        self._search_chunk(ids)

        return num_texts, num_words

    def _search_chunk(self, ids: list[int]) -> None:
        if not len(self._hashes):
            return

        array = np.asarray(ids, dtype=np.int32)
        hashes = self._hash_windows(array)[self._find_windows(array)]

        places = np.searchsorted(self._hashes, hashes)
        places = np.minimum(places, len(self._hashes) - 1)

        self._is_found[places[self._hashes[places] == hashes]] = True

    def _find_windows(self, ids: NDArray[np.int32]) -> NDArray[np.int64]:
        # (L) -> (W), the beginnings of the windows without a gap
        num_gaps = np.concatenate([[0], np.cumsum(ids == _GAP)])
        num_windows = max(0, len(ids) - self._size + 1)

        within = num_gaps[self._size :][:num_windows] - num_gaps[:num_windows]

        return np.flatnonzero(within == 0)

    def _hash_windows(self, ids: NDArray[np.int32]) -> NDArray[np.uint64]:
        num_windows = max(0, len(ids) - self._size + 1)
        codes = self._codes[ids]
        hashes = np.zeros(num_windows, dtype=np.uint64)

        # A polynomial modulo 2 ** 64.
        for offset in range(self._size):
            hashes = hashes * _MULTIPLIER + codes[offset : offset + num_windows]

        return hashes

    def count_ngrams(self) -> NDArray[np.int64]:
        """Count the n-grams of every item, repetitions included.

        :returns: The counts. *Shape:* ``(num_items)``.
        """
        return np.bincount(self._owners, minlength=self._num_items)

    def count_found(self) -> NDArray[np.int64]:
        """Count the n-grams of every item that were found, repetitions included.

        :returns: The counts. *Shape:* ``(num_items)``.
        """
        found = self._owners[self._is_found[self._ngram_idx]]

        return np.bincount(found, minlength=self._num_items)

    def first_found(self, item: int) -> str:
        """Return the first n-gram of an item that was found.

        :param item: The item, from 0.

        :returns: Its words.

        :raises ValueError: None of the item's n-grams was found.
        """
        found = self._is_found[self._ngram_idx] & (self._owners == item)

        if not found.any():
            raise ValueError(f"No n-gram of `item` ({item}) was found.")

        start = self._starts[int(np.argmax(found))]

        return " ".join(
            self._words[i] for i in self._item_ids[start : start + self._size]
        )
