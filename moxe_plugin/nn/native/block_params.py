"""The rows and the parameters of whole blocks in C++."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor

from moxe_plugin.nn.block_weights import MLSTMWeights, SLSTMWeights
from moxe_plugin.nn.rows import Rows


class BlockRows(NamedTuple):
    """Which of C rows are whose."""

    counts: array[int]
    """The number of rows of each expert; a single block is that of one expert."""

    run_lens: array[int]
    """The numbers of rows that are convolved together, as many of them for each expert.
    """


def find_block_rows(
    shape: Sequence[int], num_blocks: int, rows: Rows | None
) -> BlockRows:
    """Find the rows of a batch.

    :param shape: ``([E,]N,S,M)``.
    :param num_blocks: The number of stacked blocks E, 1 for a single one.
    :param rows: The rows, if they leave out padding, for which ``shape`` tells nothing;
        ``None`` if they are the whole batch.

    :returns: The rows.
    """
    if rows is not None:
        return BlockRows(array("q", rows.counts), array("q", rows.seq_lens))

    *batch, seq_len, _ = shape
    num_runs = math.prod(batch)
    counts = [num_runs * seq_len // num_blocks] * num_blocks

    return BlockRows(array("q", counts), array("q", [seq_len] * num_runs))


def count_blocks(params: Sequence[Tensor]) -> int:
    """Count the blocks whose parameters are stacked.

    A bank may be called with those of some of its experts.

    :param params: The parameters; the first is a vector for each expert of a bank.

    :returns: E; 1 for a single block.
    """
    return params[0].size(0) if params[0].ndim == 2 else 1


def create_grads(
    weights: MLSTMWeights | SLSTMWeights, needs: Sequence[bool], spared: Set[str]
) -> list[Tensor | None]:
    """Create tensors for the gradients of parameters.

    :param weights: The parameters, contiguous.
    :param needs: Which gradients are wanted.
    :param spared: The names of parameters whose gradients are only computed if they
        are.

    :returns: As the parameters, not set; ``None`` for what is not computed.
    """
    return [
        torch.empty_like(x) if is_wanted or name not in spared else None
        for name, x, is_wanted in zip(weights._fields, weights, needs, strict=True)
    ]
