"""Products and scales of experts on rows that are sorted by expert, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override

from moxe_plugin.nn.autocast import recalls_autocast, remembers_autocast
from moxe_plugin.nn.backend import product_dtype
from moxe_plugin.nn.native.row_products import ColumnProduct
from moxe_plugin.nn.products import runs_native
from moxe_plugin.nn.ragged_products import multiply_columns, multiply_rows


def grouped_product(rows: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """Multiply the rows of each expert by the expert's weight.

    Under autocast it computes in autocast's type, see
    :func:`~moxe_plugin.nn.products.matmul`. The gradient of an expert without a row is
    0.

    :param rows: The rows of expert 0, of expert 1 and so on. *Shape:* ``(C,in)``.
    :param weight: *Shape:* ``(E,in,out)``.
    :param counts: The number of rows of each expert, C in all.

    :returns: *Shape:* ``(C,out)``.
    """
    return grouped_head_product(rows, weight.unsqueeze(1), counts)


def grouped_head_product(rows: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """Multiply each group of channels by its own weight of the row's expert.

    :param rows: As for :func:`grouped_product`. *Shape:* ``(C,G*in)``.
    :param weight: *Shape:* ``(E,G,in,out)``.
    :param counts: The number of rows of each expert, C in all.

    :returns: *Shape:* ``(C,G*out)``.
    """
    return grouped_head_products([rows], weight.unsqueeze(-2), counts)[0]


def grouped_head_products(
    rows: Sequence[Tensor], weight: Tensor, counts: Sequence[int]
) -> list[Tensor]:
    """Compute several :func:`grouped_head_product`, whose weights are one parameter.

    :param rows: P of them. *Shape:* ``(C,G*in)`` each.
    :param weight: *Shape:* ``(E,G,in,P,out)``.
    :param counts: The number of rows of each expert, C in all.

    :returns: *Shape:* ``(C,G*out)`` each.
    """
    if not runs_native(weight, *rows):
        # As a product under autocast would; C++ rounds by itself.
        weight, *rows = [x.to(product_dtype(x)) for x in (weight, *rows)]

    return list(_GroupedProducts.apply(tuple(counts), weight, *rows))  # type: ignore[no-untyped-call]  # torch


def spread(vectors: Tensor, counts: Sequence[int]) -> Tensor:
    """Give each row the vector of its expert.

    Its gradient sums the rows of each expert in their order, so that it does not depend
    on the order of execution.

    :param vectors: *Shape:* ``(E,M)``.
    :param counts: The number of rows of each expert, C in all.

    :returns: *Shape:* ``(C,M)``.
    """
    return _Spread.apply(vectors, tuple(counts))  # type: ignore[no-any-return, no-untyped-call]  # torch


class _GroupedProducts(Function):
    # The gradients of the weights are parts of one tensor, which nothing has to join.

    @staticmethod
    @remembers_autocast
    @override
    def forward(
        ctx: Any, counts: tuple[int, ...], weight: Tensor, *rows: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(weight, *rows)
        ctx.counts = counts

        return tuple(multiply_rows(rows, weight.unbind(-2), counts))

    @staticmethod
    @recalls_autocast
    @override
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        weight, *rows = ctx.saved_tensors
        _, needs_weight, *needs_rows = ctx.needs_input_grad

        grad_weight = None
        if needs_weight:
            grad_weight = torch.empty_like(
                weight, memory_format=torch.contiguous_format
            )
            multiply_columns(
                [
                    ColumnProduct(*product)
                    for product in zip(
                        rows, grad_outputs, grad_weight.unbind(-2), strict=True
                    )
                ],
                ctx.counts,
            )

        found = iter(
            multiply_rows(
                [*compress(grad_outputs, needs_rows)],
                [part.mT for part in compress(weight.unbind(-2), needs_rows)],
                ctx.counts,
            )
        )

        return None, grad_weight, *(next(found) if x else None for x in needs_rows)


class _Spread(Function):
    @staticmethod
    @override
    def forward(ctx: Any, vectors: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.counts = counts

        return torch.cat(
            [v.expand(n, -1) for v, n in zip(vectors, counts, strict=True)]
        )

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        sums = [grads.sum(dim=0) for grads in grad_output.split(ctx.counts)]

        return torch.stack(sums), None
