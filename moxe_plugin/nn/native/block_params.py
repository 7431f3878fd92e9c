"""The parameters of blocks and banks in one form, for whole blocks in C++."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moxe_plugin.nn.native.row_products import (
    ColumnProduct,
    RowProduct,
    multiply_columns,
    multiply_rows,
)
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


def stack_params(params: Sequence[Tensor]) -> list[Tensor]:
    """Let the parameters of a single block be those of a bank of one.

    :param params: The parameters; the first is a vector for each expert of a bank.

    :returns: The same with E first, contiguous.
    """
    is_bank = params[0].ndim == 2

    return [(x if is_bank else x.unsqueeze(0)).contiguous() for x in params]


def unstack_grads(
    grads: Sequence[Tensor | None], params: Sequence[Tensor]
) -> list[Tensor | None]:
    """Bring gradients into the form of the parameters.

    :param grads: The gradients of what :func:`stack_params` returned.
    :param params: The parameters.

    :returns: The gradients.
    """
    return [
        x
        if x is None or (x.dtype is param.dtype and x.ndim == param.ndim)
        else x.to(param.dtype).view(param.shape)
        for x, param in zip(grads, params, strict=True)
    ]


def project(
    rows: Sequence[Tensor], weights: Sequence[Tensor], counts: Sequence[int]
) -> list[Tensor]:
    """Multiply rows by their expert's weights, one for each group of channels.

    :param rows: *Shape:* ``(C,G*in)`` each.
    :param weights: *Shape:* ``(E,G,in,out)`` each.
    :param counts: The number of rows of each expert, C in all.

    :returns: *Shape:* ``(C,G*out)`` each.
    """
    products = [
        RowProduct(x, w, x.new_empty(x.size(0), w.size(1) * w.size(3)))
        for x, w in zip(rows, weights, strict=True)
    ]
    multiply_rows(products, counts)

    return [product.out for product in products]


def project_onto(
    residual: Tensor, rows: Tensor, weight: Tensor, counts: Sequence[int]
) -> Tensor:
    """Add what :func:`project` makes of some rows to others.

    :param residual: *Shape:* ``(C,G*out)``.
    :param rows: *Shape:* ``(C,G*in)``.
    :param weight: *Shape:* ``(E,G,in,out)``.
    :param counts: As there.

    :returns: A new tensor. *Shape:* ``(C,G*out)``.
    """
    out = residual.clone()
    multiply_rows([RowProduct(rows, weight, out)], counts, adds=True)

    return out


def weight_gradient(
    rows: Tensor, grad: Tensor, weight: Tensor, counts: Sequence[int]
) -> Tensor:
    """Compute the gradient of a weight that :func:`project` was asked for with.

    :param rows: *Shape:* ``(C,G*in)``.
    :param grad: That of the result. *Shape:* ``(C,G*out)``.
    :param weight: *Shape:* ``(E,G,in,out)``.
    :param counts: As there.

    :returns: As ``weight``, contiguous.
    """
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    multiply_columns([ColumnProduct(rows, grad, out)], counts)

    return out
