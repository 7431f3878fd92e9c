"""Streams whose tokens tell their position, and ranks without processes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from fairseq2.datasets import SequenceBatch
from fairseq2.gang import FakeGang, Gangs
from torch import Tensor

from moxe_plugin.data.shard_writer import ShardWriter


def make_gangs(rank: int = 0, size: int = 1) -> Gangs:
    """Make the gangs of one of ``size`` data-parallel ranks.

    :param rank: The rank.
    :param size: The number of ranks.

    :returns: The gangs.
    """
    device = torch.device("cpu")

    dp = FakeGang(device, rank=rank, size=size)
    one = FakeGang(device)

    return Gangs(root=dp, dp=dp, rdp=one, sdp=dp, tp=one, pp=one)


def write_positions(path: Path, num_tokens: int, *, vocab_size: int = 5000) -> Path:
    """Write a split ``train`` of which token ``i`` is ``i``, in several shards.

    :param path: The directory to make.
    :param num_tokens: The length of the stream, at least 3.
    :param vocab_size: Stated in the manifest; every token must be less.

    :returns: ``path``.
    """
    with ShardWriter(
        path,
        tokenizer_name="positions",
        tokenizer_sha256="0" * 64,
        vocab_size=vocab_size,
        eos_idx=0,
        source="test",
        max_shard_tokens=37,
    ) as writer:
        # The stream is `eos d eos`; a document of one token makes a shard end soon.
        ids = [*range(1, num_tokens - 1)]
        for start in range(0, len(ids), 10):
            chunk = ids[start : start + 10]
            if start + 10 >= len(ids):
                writer.add_document("train", chunk, len(chunk))
            else:
                # Its closing separator takes the place of the last id.
                writer.add_document("train", chunk[:-1], len(chunk))

    return path


def collect_targets(batches: Iterable[list[SequenceBatch]]) -> list[tuple[int, int]]:
    """Collect every pair of token and target that counts.

    :param batches: What a reader yields.

    :returns: The pairs, in order.
    """
    pairs: list[tuple[int, int]] = []

    for step in batches:
        for batch in step:
            pairs.extend(_pairs(batch))

    return pairs


def _pairs(batch: SequenceBatch) -> list[tuple[int, int]]:
    source, target = batch.as_auto_regressive()

    assert target.num_target_elements > 0

    mask = torch.ones_like(target.seqs, dtype=torch.bool)
    if target.target_mask is not None:
        mask &= target.target_mask

    for row, seq_len in enumerate(target.seq_lens):
        mask[row, seq_len:] = False

    return list(zip(_list(source.seqs[mask]), _list(target.seqs[mask]), strict=True))


def _list(tensor: Tensor) -> list[int]:
    values: list[int] = tensor.tolist()

    return values
