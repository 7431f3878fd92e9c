"""From the attention masks of transformers to rows that are padded on the right."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Alignment(NamedTuple):
    """Where the tokens of each row are."""

    seq_lens: list[int]
    """How many tokens each row has."""

    shifts: Tensor | None
    """How much padding stands on the left of each row; ``None`` if there is none.
    *Shape:* ``(N)``."""

    def to_left(self, seqs: Tensor) -> Tensor:
        """Let every row begin with its first token.

        :param seqs: *Shape:* ``(N,S,*)``.

        :returns: The same values, the padding of the left on the right. *Shape:* as
            ``seqs``.
        """
        return seqs if self.shifts is None else _roll(seqs, self.shifts)

    def back(self, seqs: Tensor) -> Tensor:
        """Undo :meth:`to_left`.

        :param seqs: *Shape:* ``(N,S,*)``.

        :returns: The values in their places. *Shape:* as ``seqs``.
        """
        return seqs if self.shifts is None else _roll(seqs, -self.shifts)


def align(seqs: Tensor, attention_mask: Tensor | None) -> Alignment:
    """Find the tokens of each row.

    :param seqs: Token ids. *Shape:* ``(N,S)``.
    :param attention_mask: 1 for tokens, 0 for padding; for more columns than ``seqs``
        has, the last ones count. *Shape:* ``(N,P)``.

    :returns: Where they are.

    :raises ValueError: The mask has another shape, a row without a token, or padding
        between tokens.
    """
    batch_size, width = seqs.shape

    if attention_mask is None:
        return Alignment([width] * batch_size, None)

    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] != batch_size or shape[1] < width:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids` {(batch_size, width)}"
            f", preceded by the columns read before, but has {shape} instead."
        )

    is_token = attention_mask[:, -width:].bool()

    seq_lens, shifts = is_token.sum(dim=1), is_token.int().argmax(dim=1)

    columns = torch.arange(width, device=seqs.device)
    expected = (columns >= shifts[:, None]) & (columns < (shifts + seq_lens)[:, None])

    if not bool(seq_lens.all()) or not bool((expected == is_token).all()):
        raise ValueError(
            "`attention_mask` must have a 1 in each row and no 0 between two, since "
            "padding can only stand on the left and on the right."
        )

    return Alignment(seq_lens.tolist(), shifts if bool(shifts.any()) else None)


def _roll(seqs: Tensor, shifts: Tensor) -> Tensor:
    width = seqs.size(1)

    # (S) + (N,1) -> (N,S)
    columns = (torch.arange(width, device=seqs.device) + shifts[:, None]) % width
    rows = torch.arange(seqs.size(0), device=seqs.device)[:, None]

    return seqs[rows, columns]
