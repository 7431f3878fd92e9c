"""Where the rows of ragged batches are, as GPU kernels want to know it.

The rows ``(C,M)`` of a bank of experts are sorted by expert, sequence and time, without
padding. A *segment* is what one expert sees of one sequence; there are ``E * N``, some
of them empty. A block that is no bank is one of a single expert, E = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class RaggedRows(NamedTuple):
    """Where C rows stand; the tensors are int32 and on the rows' device."""

    num_seqs: int
    """The number of sequences N: row c is of expert ``segment_of_row[c] // N``."""

    counts: Sequence[int]
    """The number of rows of each expert, 0 allowed."""

    max_len: int
    """The length of the longest segment."""

    begins: Tensor
    """The first row of each segment, and C. *Shape:* ``(E*N+1)``."""

    segment_of_row: Tensor
    """The segment of each row, ascending. *Shape:* ``(C)``."""

    step_of_row: Tensor
    """Where each row stands in its segment, from 0. *Shape:* ``(C)``."""

    @property
    def num_experts(self) -> int:
        """The number of experts E."""
        return len(self.counts)

    @property
    def num_rows(self) -> int:
        """The number of rows C."""
        return self.segment_of_row.size(0)


def ends_of_experts(rows: RaggedRows) -> Tensor | None:
    """Tell where the rows of each expert end.

    :param rows: The rows.

    :returns: int32, on the rows' device; ``None`` for a single expert, whose rows are
        all. *Shape:* ``(E)``.
    """
    if rows.num_experts == 1:
        return None

    return rows.begins[rows.num_seqs :: rows.num_seqs].contiguous()


def with_dense_rows(rows: Tensor) -> Tensor:
    """Bring rows into a form that kernels read.

    They take any distance between rows, but none between columns.

    :param rows: *Shape:* ``(C,M)``.

    :returns: The same, copied if columns are apart.
    """
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def ragged_rows(seq_lens: Sequence[Sequence[int]], device: torch.device) -> RaggedRows:
    """Lay out segments of given lengths.

    :param seq_lens: The length of each expert's part of each sequence, ``(E,N)``.
    :param device: Where the rows are.

    :returns: The layout.
    """
    flat = [length for lens in seq_lens for length in lens]
    lens = torch.tensor(flat, dtype=torch.int32)
    begins = torch.tensor([0, *accumulate(flat)], dtype=torch.int32)

    segment_of_row = torch.arange(len(flat), dtype=torch.int32).repeat_interleave(lens)
    step_of_row = torch.arange(len(segment_of_row), dtype=torch.int32)
    step_of_row -= begins[segment_of_row]

    return RaggedRows(
        len(seq_lens[0]),
        [sum(lens) for lens in seq_lens],
        max(flat),
        *(x.to(device) for x in (begins, segment_of_row, step_of_row)),
    )


@lru_cache(maxsize=8)
def full_rows(num_seqs: int, seq_len: int, device: torch.device) -> RaggedRows:
    """Lay out sequences of the same length, of a block that is no bank.

    :param num_seqs: Their number N.
    :param seq_len: Their length.
    :param device: Where the rows are.

    :returns: The layout, which is shared: its tensors must not be changed.
    """
    return ragged_rows([[seq_len] * num_seqs], device)
