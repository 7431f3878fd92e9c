"""Tests of moxe_plugin/eval/prefix_tree.py."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moxe_plugin.eval.prefix_tree import (
    PrefixNode,
    build_prefix_forest,
    count_tokens,
    make_leaves,
)

# Few letters, so that many sequences begin alike or are the beginning of another.
SEQS = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=7).map(tuple),
    unique=True,
    max_size=12,
).map(sorted)


def walk(nodes: Sequence[PrefixNode]) -> list[PrefixNode]:
    """List the pieces, each before those that follow it."""
    return [n for node in nodes for n in (node, *walk(node.children))]


@given(seqs=SEQS, min_shared_tokens=st.integers(1, 4))
def test_pieces_make_up_every_sequence(
    seqs: list[tuple[int, ...]], min_shared_tokens: int
) -> None:
    forest = build_prefix_forest(seqs, min_shared_tokens=min_shared_tokens)

    for idx, seq in enumerate(seqs):
        path = [node for node in walk(forest) if idx in node.members]

        assert [node.begin for node in path] == [0, *(node.end for node in path)][:-1]
        assert sum((tuple(node.tokens) for node in path), ()) == seq

    for node in walk(forest):
        assert node.tokens
        assert len(node.members) == 1 or len(node.tokens) >= min_shared_tokens

    assert count_tokens(forest) <= sum(len(seq) for seq in seqs)


@given(seqs=SEQS)
def test_with_no_least_length_nothing_is_computed_twice(
    seqs: list[tuple[int, ...]],
) -> None:
    forest = build_prefix_forest(seqs, min_shared_tokens=1)

    beginnings = {seq[:end] for seq in seqs for end in range(1, len(seq) + 1)}

    assert count_tokens(forest) == len(beginnings)


def test_short_pieces_are_not_shared_but_longer_ones_behind_them_are() -> None:
    seqs = [(0, 1, 1, 5), (0, 1, 1, 6), (0, 2, 2, 7), (0, 2, 2, 8), (9, 9)]

    forest = build_prefix_forest(seqs, min_shared_tokens=3)

    assert [node.tokens for node in forest] == [(0, 1, 1), (0, 2, 2), (9, 9)]
    assert [child.tokens for child in forest[0].children] == [(5,), (6,)]
    assert count_tokens(forest) == 12


def test_a_sequence_that_begins_another_ends_at_an_inner_piece() -> None:
    forest = build_prefix_forest([(1, 2), (1, 2, 3)], min_shared_tokens=2)

    (node,) = forest
    assert (list(node.members), node.tokens) == ([0, 1], (1, 2))
    assert [(list(c.members), c.begin) for c in node.children] == [([1], 2)]


def test_leaves_share_nothing() -> None:
    assert count_tokens(make_leaves([(1, 2), (1, 2, 3)])) == 5


@pytest.mark.parametrize(
    ("seqs", "message"),
    [
        ([()], "empty sequence"),
        ([(2,), (1,)], "lexicographic order"),
        ([(1,), (1,)], "different"),
    ],
)
def test_sequences_must_be_different_and_in_order(
    seqs: list[tuple[int, ...]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_prefix_forest(seqs)


def test_a_few_words_of_long_passages_are_not_shared() -> None:
    # Four of two hundred tokens, and four of forty.
    long = [(*range(4), first, *range(95)) for first in (7, 8)]
    short = [(*range(4), first, *range(15)) for first in (7, 8)]

    assert count_tokens(build_prefix_forest(long)) == 200
    assert count_tokens(build_prefix_forest(short)) == 40 - 4
