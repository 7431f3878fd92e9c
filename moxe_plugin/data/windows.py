"""Cuts a token stream into windows, for training and for validation."""

from __future__ import annotations

import numpy as np
import torch
from fairseq2.datasets import SequenceBatch
from fairseq2.recipe.error import RecipeError
from numpy.typing import NDArray

from moxe_plugin.data.shards import TokenStream


class TrainWindows:
    """The full windows of a stream: row ``i`` is tokens ``[i*S, i*S + S]``.

    :param stream: The tokens.
    :param seq_len: ``S``, the number of targets in a window.
    """

    def __init__(self, stream: TokenStream, seq_len: int) -> None:
        self._stream = stream
        self._seq_len = seq_len

    def __len__(self) -> int:
        """Count the rows."""
        return max(0, len(self._stream) - 1) // self._seq_len

    def compute_sha256(self) -> str:
        """Compute a digest of the stream.

        :returns: The digest, in hexadecimal.
        """
        return self._stream.compute_sha256()

    def collate(self, indices: NDArray[np.int64]) -> SequenceBatch:
        """Make a batch of windows.

        :param indices: Row numbers.

        :returns: The batch. *Shape of seqs:* ``(N,S+1)``.
        """
        starts = indices * self._seq_len

        return SequenceBatch(_read_rows(self._stream, starts, self._seq_len + 1), None)


class EvalWindows:
    """Windows that make every token but the first a target exactly once.

    The number of rows is a multiple of ``num_ranks``: as many full windows as give
    every rank the same number, then what is left in equal parts of at least one target,
    each in a window with a mask.

    :param stream: The tokens.
    :param seq_len: ``S``, the largest number of targets in a window, at least 2.
    :param num_ranks: The number of ranks that share the rows.

    :raises RecipeError: The stream has fewer targets than there are ranks, or
        ``seq_len`` is 1.
    """

    def __init__(self, stream: TokenStream, seq_len: int, num_ranks: int) -> None:
        # With one target per window, a rest could leave a rank without any.
        if seq_len < 2:
            raise RecipeError(f"`seq_len` must be at least 2, but is {seq_len}.")

        num_targets = len(stream) - 1

        if num_targets < num_ranks:
            raise RecipeError(
                f"The dataset split has {num_targets} targets, fewer than ranks "
                f"({num_ranks})."
            )

        round_size = num_ranks * seq_len

        num_rounds, num_left = divmod(num_targets, round_size)

        # Too few to give every rank a target: take the last full round too.
        if 0 < num_left < num_ranks:
            num_rounds -= 1
            num_left += round_size

        num_full = num_rounds * num_ranks
        num_parts = -(-num_left // round_size) * num_ranks

        first_left = num_full * seq_len + 1

        # The first target of each row, and the end of the last.
        self._bounds = np.concatenate(
            [
                np.arange(num_full, dtype=np.int64) * seq_len + 1,
                first_left + np.arange(num_parts) * num_left // max(num_parts, 1),
                [num_targets + 1],
            ]
        )

        self._stream = stream
        self._width = min(seq_len + 1, len(stream))

    def __len__(self) -> int:
        """Count the rows."""
        return len(self._bounds) - 1

    def compute_sha256(self) -> str:
        """Compute a digest of the stream.

        :returns: The digest, in hexadecimal.
        """
        return self._stream.compute_sha256()

    def collate(self, indices: NDArray[np.int64]) -> SequenceBatch:
        """Make a batch of windows.

        :param indices: Row numbers.

        :returns: The batch. *Shape of seqs:* ``(N,S+1)``.
        """
        firsts, ends = self._bounds[indices], self._bounds[indices + 1]

        starts = np.maximum(ends - self._width, 0)

        seqs = _read_rows(self._stream, starts, self._width)

        if (starts == firsts - 1).all() and (ends == starts + self._width).all():
            return SequenceBatch(seqs, None)

        positions = starts[:, None] + np.arange(self._width)

        mask = (positions >= firsts[:, None]) & (positions < ends[:, None])

        return SequenceBatch(seqs, None, target_mask=torch.from_numpy(mask))


def _read_rows(
    stream: TokenStream, starts: NDArray[np.int64], width: int
) -> torch.Tensor:
    rows = np.stack([stream.read(int(s), int(s) + width) for s in starts])

    return torch.from_numpy(rows)
