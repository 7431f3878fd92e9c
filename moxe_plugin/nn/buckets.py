"""Sub-sequences of similar length together, for cells that have no parameters.

A cell that is the same for all experts need not keep them apart: what is padded is then
a bucket of sub-sequences of about the same length, whoever's they are, and no longer
all of them to the longest of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

import torch
from torch import Tensor

from moxe_plugin.nn.rows import Rows, fill_slots, take_rows

MAX_BUCKETS: Final = 6
"""More buckets spare little, and each is a pass of the cell."""

MIN_SPARED_SHARE: Final = 0.2
"""A bucket is cut in two only if that spares this share of all positions: a pass more
has its own cost."""


class Buckets(NamedTuple):
    """Where rows stand in buckets: right-padded batches of sub-sequences."""

    shapes: list[tuple[int, int]]
    """Sub-sequences and padded length of each bucket."""

    segments: list[Tensor]
    """The sub-sequences of each bucket, by their index in ``(E,N)``. *Shape:* ``(B)``
    each."""

    seq_lens: list[Tensor | None]
    """Their lengths; ``None`` if all are full. *Shape:* ``(B)`` each."""

    slot_of_row: Tensor
    """The position of each row in the flat buckets. *Shape:* ``(C)``."""

    @property
    def num_slots(self) -> int:
        """The positions of all buckets."""
        return sum(size * length for size, length in self.shapes)


def find_buckets(rows: Rows) -> Buckets:
    """Sort sub-sequences into buckets of similar length.

    Sub-sequences of length 0 are in none.

    :param rows: The rows.

    :returns: The buckets, from the longest sub-sequences to the shortest.
    """
    device = rows.slot_of_row.device
    lens = rows.seq_lens

    order = sorted(
        (i for i, length in enumerate(lens) if length > 0), key=lambda i: -lens[i]
    )
    sorted_lens = [lens[i] for i in order]

    bounds = _cut(sorted_lens)
    begins = [
        0,
        *accumulate(
            (end - begin) * sorted_lens[begin] for begin, end in pairwise(bounds)
        ),
    ]

    shapes, segments, seq_lens = [], [], []
    first_slots = [0] * len(lens)

    for begin, end, first in zip(bounds, bounds[1:], begins, strict=False):
        members, length = order[begin:end], sorted_lens[begin]

        for place, segment in enumerate(members):
            first_slots[segment] = first + place * length

        shapes.append((end - begin, length))
        segments.append(torch.tensor(members, device=device))
        is_full = sorted_lens[end - 1] == length
        seq_lens.append(
            None if is_full else torch.tensor(sorted_lens[begin:end], device=device)
        )

    first_slot = torch.tensor(first_slots, device=device)

    return Buckets(
        shapes, segments, seq_lens, first_slot[rows.segment_of_row] + rows.step_of_row
    )


def to_buckets(flat: Tensor, buckets: Buckets) -> list[Tensor]:
    """Pad rows into buckets, with zeros.

    :param flat: *Shape:* ``(C,M)``.
    :param buckets: The buckets.

    :returns: *Shape:* ``(B,S,M)`` each.
    """
    slots = fill_slots(flat, buckets.slot_of_row, buckets.num_slots)
    parts = slots.split([size * length for size, length in buckets.shapes])

    return [
        part.view(size, length, -1)
        for part, (size, length) in zip(parts, buckets.shapes, strict=True)
    ]


def from_buckets(parts: Sequence[Tensor], buckets: Buckets) -> Tensor:
    """Take rows out of buckets: the inverse of :func:`to_buckets`.

    :param parts: *Shape:* ``(B,S,M)`` each; at least one.
    :param buckets: The buckets.

    :returns: *Shape:* ``(C,M)``.
    """
    slots = torch.cat([part.flatten(0, 1) for part in parts])

    return take_rows(slots, buckets.slot_of_row)


def _cut(lens: Sequence[int]) -> list[int]:
    # Where buckets begin, and the end, of descending lengths: again and again where a
    # cut spares most.
    bounds = [0, len(lens)] if lens else [0]
    min_spared = MIN_SPARED_SHARE * sum(lens)

    while len(bounds) - 1 < MAX_BUCKETS:
        spared, cut = max(
            (
                ((lens[begin] - lens[i]) * (end - i), i)
                for begin, end in pairwise(bounds)
                for i in range(begin + 1, end)
            ),
            default=(0, 0),
        )

        if spared == 0 or spared < min_spared:
            break

        bounds = sorted([*bounds, cut])

    return bounds
