"""Token sequences as a tree, so that a beginning that they share is computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Final

MIN_SHARED_TOKENS: Final = 4
"""A shorter piece, in tokens, is computed once per sequence: to share it would take a
batch more."""

MIN_SPARED_SHARE: Final = 0.04
"""A piece is shared only if that spares this share of the sequences' tokens from there
on: all of them then need a state, which has its own cost. Passages that merely begin
with the same few words are below, answers to a question above."""


@dataclass(frozen=True, kw_only=True)
class PrefixNode:
    """A piece of one or more sequences, which have all tokens up to its end in common.

    The pieces on the way from the root to a sequence's last node make up the sequence.
    """

    begin: int
    """The position of the first token of the piece."""

    tokens: Sequence[int]
    """The tokens of the piece, at least one."""

    members: Sequence[int]
    """Indices of the sequences that have it."""

    children: Sequence[PrefixNode]
    """The pieces that follow it; none where no member goes on."""

    @property
    def end(self) -> int:
        """The position behind the last token of the piece."""
        return self.begin + len(self.tokens)


def build_prefix_forest(
    seqs: Sequence[tuple[int, ...]], *, min_shared_tokens: int = MIN_SHARED_TOKENS
) -> list[PrefixNode]:
    """Find the beginnings that sequences share.

    :param seqs: Different sequences in lexicographic order, none of them empty.
    :param min_shared_tokens: The least length of a piece of several sequences.

    :returns: The first pieces, in the order of the sequences.

    :raises ValueError: The sequences are not in order, not different, or one is empty.
    """
    if seqs and not seqs[0]:
        raise ValueError("`seqs` must not have an empty sequence.")

    if any(not a < b for a, b in pairwise(seqs)):
        raise ValueError("`seqs` must be different and in lexicographic order.")

    return list(_grow(seqs, range(len(seqs)), 0, min_shared_tokens))


def make_leaves(seqs: Sequence[tuple[int, ...]]) -> list[PrefixNode]:
    """Make a forest in which nothing is shared.

    :param seqs: The sequences, none of them empty.

    :returns: A piece per sequence.
    """
    return [
        PrefixNode(begin=0, tokens=seq, members=[idx], children=[])
        for idx, seq in enumerate(seqs)
    ]


def count_tokens(forest: Sequence[PrefixNode]) -> int:
    """Count the tokens of all pieces.

    :param forest: The first pieces.

    :returns: How many tokens are to be computed.
    """
    return sum(len(node.tokens) + count_tokens(node.children) for node in forest)


def _grow(
    seqs: Sequence[tuple[int, ...]], members: range, begin: int, min_shared: int
) -> Iterator[PrefixNode]:
    # The members have the tokens before `begin` in common; some may end there.
    for group in _split(seqs, members, begin):
        yield from _cluster(seqs, group, begin, begin, min_shared)


def _cluster(
    seqs: Sequence[tuple[int, ...]],
    group: range,
    begin: int,
    depth: int,
    min_shared: int,
) -> Iterator[PrefixNode]:
    # The group has the tokens from `begin` up to and including `depth` in common.
    first = seqs[group[0]]

    if len(group) == 1:
        yield PrefixNode(begin=begin, tokens=first[begin:], members=group, children=[])
        return

    # In lexicographic order what the outer two share, all share.
    end = _find_difference(first, seqs[group[-1]], depth)

    if end - begin >= min_shared and _spares_enough(seqs, group, begin, end):
        yield PrefixNode(
            begin=begin,
            tokens=first[begin:end],
            members=group,
            children=list(_grow(seqs, group, end, min_shared)),
        )
        return

    if len(first) == end:
        yield from _cluster(seqs, group[:1], begin, end, min_shared)

    for part in _split(seqs, group, end):
        yield from _cluster(seqs, part, begin, end, min_shared)


def _spares_enough(
    seqs: Sequence[tuple[int, ...]], group: range, begin: int, end: int
) -> bool:
    num_tokens = sum(len(seqs[idx]) - begin for idx in group)

    return (end - begin) * (len(group) - 1) >= MIN_SPARED_SHARE * num_tokens


def _find_difference(one: Sequence[int], other: Sequence[int], begin: int) -> int:
    end = min(len(one), len(other))

    return next((i for i in range(begin, end) if one[i] != other[i]), end)


def _split(
    seqs: Sequence[tuple[int, ...]], members: range, position: int
) -> Iterator[range]:
    # By the token at the position; members that have none are left out.
    rest = [idx for idx in members if len(seqs[idx]) > position]

    for _, group in groupby(rest, key=lambda idx: seqs[idx][position]):
        indices = list(group)
        yield range(indices[0], indices[-1] + 1)
