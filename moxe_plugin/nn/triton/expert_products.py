"""Products of ragged rows with their expert's weight: torch's, expert by expert.

Without gradients: autograd functions of whole blocks call these.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from moxe_plugin.nn.ragged import RaggedRows


def stack_params(params: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Bring parameters into the form that kernels read.

    :param params: Those of a bank, or of a block that is none; the first is a vector
        for each expert.
    :param dtype: What is computed in.

    :returns: The same, contiguous, with E first; E is 1 for a block that is no bank.
    """
    is_bank = params[0].ndim == 2
    params = [x.to(dtype).contiguous() for x in params]

    return params if is_bank else [x.unsqueeze(0) for x in params]


def multiply_rows(flat: Tensor, weight: Tensor, rows: RaggedRows) -> Tensor:
    """Multiply each row by the weight of its expert.

    :param flat: *Shape:* ``(C,in)``.
    :param weight: *Shape:* ``(E,in,out)``.
    :param rows: Where rows stand.

    :returns: *Shape:* ``(C,out)``.
    """
    if weight.size(0) == 1:
        return torch.mm(flat, weight[0])

    out = flat.new_empty(flat.size(0), weight.size(2))
    for (begin, end), w in zip(_spans(tuple(rows.counts)), weight, strict=True):
        torch.mm(flat[begin:end], w, out=out[begin:end])

    return out


def multiply_add_rows(
    residual: Tensor, flat: Tensor, weight: Tensor, rows: RaggedRows
) -> Tensor:
    """Add :func:`multiply_rows` to other rows.

    :param residual: *Shape:* ``(C,out)``.
    :param flat: *Shape:* ``(C,in)``.
    :param weight: *Shape:* ``(E,in,out)``.
    :param rows: Where rows stand.

    :returns: A new tensor. *Shape:* ``(C,out)``.
    """
    if weight.size(0) == 1:
        return torch.addmm(residual, flat, weight[0])

    out = torch.empty_like(residual)
    for (begin, end), w in zip(_spans(tuple(rows.counts)), weight, strict=True):
        torch.addmm(residual[begin:end], flat[begin:end], w, out=out[begin:end])

    return out


def multiply_columns(
    lhs: Tensor, rhs: Tensor, like: Tensor, rows: RaggedRows
) -> Tensor:
    """Compute each expert's ``lhs^T rhs``, the gradient of its weight.

    :param lhs: *Shape:* ``(C,in)``.
    :param rhs: *Shape:* ``(C,out)``.
    :param like: The weight. *Shape:* ``(E,in,out)``.
    :param rows: Where rows stand.

    :returns: 0 for an expert without a row. *Shape:* ``(E,in,out)``.
    """
    out = torch.empty_like(like)
    for (begin, end), w in zip(_spans(tuple(rows.counts)), out, strict=True):
        torch.mm(lhs[begin:end].t(), rhs[begin:end], out=w)

    return out


@lru_cache(maxsize=256)
def _spans(counts: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(pairwise(accumulate(counts, initial=0)))
