"""The texts that runs are measured on: documents and last-word passages, as tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moxe_plugin.data.documents import read_texts
from moxe_plugin.data.manifest import compute_sha256

Encode = Callable[[str], Sequence[int]]

_MIN_DOCUMENT_TOKENS: Final = 64
"""Shorter documents say too little for a rank correlation of their own."""

_TEXT_COLUMN: Final = "text"


class Documents(NamedTuple):
    """Held-out documents, as one file holds them."""

    sha256: str
    """Of the file."""

    token_ids: Sequence[NDArray[np.int64]]
    """*Shape:* ``(S)`` each."""


class Passages(NamedTuple):
    """Passages whose last word is to be predicted."""

    sha256: str
    """Of the file."""

    pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    """Token ids of the context and of the last word."""


def read_documents(file: Path, encode: Encode, max_tokens: int) -> Documents:
    """Read the beginning of each document of a file.

    :param file: ``.jsonl`` with a field ``text``, ``.parquet`` with such a column, or
        ``.txt`` with blank lines between documents.
    :param encode: Encodes a text without special tokens.
    :param max_tokens: The most tokens of a document; the rest is left out.

    :returns: The documents of at least 64 tokens.

    :raises ValueError: Fewer than two documents are that long.
    """
    token_ids = [
        np.asarray(ids[:max_tokens], dtype=np.int64)
        for text in read_texts([file], _TEXT_COLUMN)
        if len(ids := encode(text)) >= _MIN_DOCUMENT_TOKENS
    ]

    if len(token_ids) < 2 or max_tokens < _MIN_DOCUMENT_TOKENS:
        raise ValueError(
            f"`{file}` must have at least two documents of {_MIN_DOCUMENT_TOKENS} "
            f"tokens, of which {max_tokens} are read, but has {len(token_ids)}."
        )

    return Documents(compute_sha256(file), token_ids)


def read_passages(file: Path, encode: Encode, max_passages: int) -> Passages:
    """Read LAMBADA: the last word of each passage follows its last space.

    Context and word are split as lm-evaluation-harness does: the word's tokens are
    those that the passage has more than its context.

    :param file: ``.jsonl`` with a field ``text``.
    :param encode: Encodes a text without special tokens.
    :param max_passages: The most passages, in the order of a hash.

    :returns: The passages.

    :raises ValueError: Fewer than two passages have a last word.
    """
    texts = sorted(
        (text for text in read_texts([file], _TEXT_COLUMN) if " " in text),
        key=lambda text: hashlib.sha256(text.encode()).digest(),
    )

    pairs = []

    for text in texts[:max_passages]:
        context = encode(text.rpartition(" ")[0])
        pairs.append((context, encode(text)[len(context) :]))

    if len(pairs) < 2:
        raise ValueError(
            f"`{file}` must have at least two passages, but has {len(pairs)}."
        )

    return Passages(compute_sha256(file), pairs)


def rarity_bins(counts: NDArray[np.int64], num_bins: int) -> NDArray[np.int64]:
    """Sort tokens into bins of equal mass, from the most frequent to the rarest.

    A token belongs to the bin in which the middle of its share of the training text
    lies, when tokens are lined up by frequency.

    :param counts: How often each token occurs in the training text. *Shape:* ``(V)``.
    :param num_bins: The number of bins.

    :returns: The bin of each token, in ``[0, num_bins)``. *Shape:* ``(V)``.
    """
    order = np.argsort(-counts, kind="stable")
    sorted_counts = counts[order]
    middles = (np.cumsum(sorted_counts) - sorted_counts / 2) / counts.sum()

    bins = np.empty(len(counts), dtype=np.int64)
    bins[order] = np.minimum((middles * num_bins).astype(np.int64), num_bins - 1)

    return bins
