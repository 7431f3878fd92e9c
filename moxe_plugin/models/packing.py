"""Lay the documents of a packed batch out as rows, and back."""

from __future__ import annotations

import torch
from fairseq2.nn import BatchLayout
from torch import Tensor


def unpack_documents(
    seqs: Tensor, seqs_layout: BatchLayout
) -> tuple[Tensor, BatchLayout]:
    """Give each document of a packed batch a row of its own.

    A recurrent state then starts empty in every document by construction.

    :param seqs: Token ids. *Shape:* ``(S)``.
    :param seqs_layout: The packed layout of ``seqs``.

    :returns: Token ids, padded on the right with the id at position 0 of the batch,
        *Shape:* ``(N,L)`` for N documents of at most L tokens; and their layout.
    """
    seq_lens = list(seqs_layout.seq_lens)
    begins = seqs_layout.seq_begin_indices_pt[:-1].long()

    # (N,1) + (L) -> (N,L)
    offsets = seqs.new_tensor(range(max(seq_lens)))
    lens = seqs_layout.seq_lens_pt.long().unsqueeze(1)
    sources = (begins.unsqueeze(1) + offsets).where(offsets < lens, 0)

    rows = seqs[sources]

    return rows, BatchLayout.of(rows, seq_lens)


def repack_documents(rows: Tensor, seqs_layout: BatchLayout) -> Tensor:
    """Put rows back into the packed order.

    :param rows: One row per document. *Shape:* ``(N,L,*)``.
    :param seqs_layout: The packed layout to return to.

    :returns: The values of all documents, 0 in the tail padding. *Shape:* ``(S,*)``.
    """
    parts = [row[:n] for row, n in zip(rows, seqs_layout.seq_lens, strict=True)]

    tail = seqs_layout.width - sum(seqs_layout.seq_lens)
    if tail > 0:
        parts.append(rows.new_zeros((tail, *rows.shape[2:])))

    return torch.cat(parts)
