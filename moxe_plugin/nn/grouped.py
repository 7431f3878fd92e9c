"""Products and scales of experts on rows that are sorted by expert, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from typing_extensions import override

from moxe_plugin.nn.native import products as native
from moxe_plugin.nn.native.products import Product
from moxe_plugin.nn.products import multiply_all, runs_native


def grouped_product(rows: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """Multiply the rows of each expert by the expert's weight.

    Under autocast it computes in autocast's type, as ``@`` does. The gradient of an
    expert without a row is 0.

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
    device_type = rows.device.type

    if torch.is_autocast_enabled(device_type) and rows.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        rows, weight = rows.to(dtype), weight.to(dtype)

    return _GroupedProduct.apply(rows, weight, tuple(counts))  # type: ignore[no-any-return, no-untyped-call]  # torch


def spread(vectors: Tensor, counts: Sequence[int]) -> Tensor:
    """Give each row the vector of its expert.

    Its gradient sums the rows of each expert in their order, so that it does not depend
    on the order of execution.

    :param vectors: *Shape:* ``(E,M)``.
    :param counts: The number of rows of each expert, C in all.

    :returns: *Shape:* ``(C,M)``.
    """
    return _Spread.apply(vectors, tuple(counts))  # type: ignore[no-any-return, no-untyped-call]  # torch


class _GroupedProduct(Function):
    @staticmethod
    @override
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, counts: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts

        return _multiply(rows, weight, counts)

    @staticmethod
    @override
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        grad_rows, grad_weight = None, None

        if ctx.needs_input_grad[0]:
            grad_rows = _multiply(grad_output, weight.mT, ctx.counts)

        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(
                weight, memory_format=torch.contiguous_format
            )
            _multiply_columns(rows, grad_output, grad_weight, ctx.counts)

        return grad_rows, grad_weight, None


def _multiply(rows: Tensor, weight: Tensor, counts: tuple[int, ...]) -> Tensor:
    num_groups, _, out_dim = weight.shape[1:]
    out = rows.new_empty(rows.size(0), num_groups * out_dim)

    if runs_native(rows, weight):
        native.multiply_rows(rows, weight, out, counts)

        return out

    multiply_all(
        [
            Product(x, w, y)
            for x, w, y in zip(
                _by_group(rows, weight, counts),
                weight,
                _by_group(out, weight, counts),
                strict=True,
            )
            if x.size(1) > 0
        ]
    )

    return out


def _multiply_columns(
    lhs: Tensor, rhs: Tensor, out: Tensor, counts: tuple[int, ...]
) -> None:
    # A product over no row is 0.
    if runs_native(lhs, rhs, out):
        native.multiply_columns(lhs, rhs, out, counts)

        return

    multiply_all(
        [
            Product(x.mT, y, z)
            for x, y, z in zip(
                _by_group(lhs, out, counts),
                _by_group(rhs, out, counts),
                out,
                strict=True,
            )
        ]
    )


def _by_group(rows: Tensor, weight: Tensor, counts: tuple[int, ...]) -> list[Tensor]:
    # (C,G*D) -> E times (G,C_e,D)
    groups = torch.unflatten(rows, 1, (weight.size(1), -1)).transpose(0, 1)

    return list(groups.split(counts, dim=1))


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
