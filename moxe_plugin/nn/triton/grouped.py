"""The product of each expert's rows with its weight, as Triton kernels.

Verified by Triton's interpreter on a CPU, and compiled for compute capability 8.0 and
9.0; neither run nor measured on a GPU yet, and no
layer calls it yet.

torch 2.9 has a product of its own, the private ``torch._grouped_mm``. Tried on a CPU,
it has the right values and gradients in float32, bfloat16 and float16, also for an
expert without rows, but wants offsets of int32 and every stride a multiple of 16 bytes,
so that the gradient of a plain sum, whose strides are 0, is an error; and its shape
function, which is a copy of the checks for CUDA, takes bfloat16 alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_BLOCK = 32
"""Rows and columns of a tile."""


def grouped_product(rows: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    """Multiply the rows of each expert by its weight, summing in float32.

    :param rows: The rows of the first expert, then of the second, and so on. *Shape:*
        ``(C,in)``.
    :param weight: Of the same type as ``rows``. *Shape:* ``(E,in,out)``.
    :param counts: How many rows each expert has; one without rows gets a gradient of 0.

    :returns: *Shape:* ``(C,out)``.

    :raises ValueError: ``counts`` does not fit ``weight`` or ``rows``.
    """
    if len(counts) != weight.size(0) or sum(counts) != rows.size(0):
        raise ValueError(
            f"`counts` must have {weight.size(0)} numbers that sum to {rows.size(0)}, "
            f"but is {list(counts)} instead."
        )

    return _GroupedProduct.apply(rows, weight, tuple(counts))  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped


class _GroupedProduct(Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, counts: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.counts = counts

        return _multiply(rows, weight, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight = ctx.saved_tensors
        grad_rows = _multiply(grad_output, weight.mT, ctx.counts)

        return grad_rows, _sum_outer(rows, grad_output, ctx.counts), None


def _precision() -> str:
    # TensorFloat-32 only where torch's own products may use it.
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _multiply(rows: Tensor, weight: Tensor, counts: Sequence[int]) -> Tensor:
    rows, weight = rows.contiguous(), weight.contiguous()
    num_in, num_out = weight.shape[1:]
    out = rows.new_empty(rows.size(0), num_out)

    ends = list(accumulate(counts))
    # Expert, first row and end of each block of rows
    blocks = [
        (expert, begin, end)
        for expert, end in enumerate(ends)
        for begin in range(end - counts[expert], end, _BLOCK)
    ]
    if blocks:
        table = torch.tensor(blocks, dtype=torch.int32, device=rows.device)
        grid = (len(blocks), triton.cdiv(num_out, _BLOCK))
        _multiply_kernel[grid](
            *(table, rows, weight, out, num_out),
            K=num_in,
            BLOCK=_BLOCK,
            PRECISION=_precision(),
        )

    return out


def _sum_outer(rows: Tensor, grads: Tensor, counts: Sequence[int]) -> Tensor:
    rows, grads = rows.contiguous(), grads.contiguous()
    num_in, num_out = rows.size(1), grads.size(1)
    out = rows.new_empty(len(counts), num_in, num_out)
    ends = [0, *accumulate(counts)]
    table = torch.tensor(ends, dtype=torch.int32, device=rows.device)

    grid = (len(counts), triton.cdiv(num_in, _BLOCK), triton.cdiv(num_out, _BLOCK))
    _sum_outer_kernel[grid](
        *(table, rows, grads, out, num_in, num_out),
        BLOCK=_BLOCK,
        PRECISION=_precision(),
    )

    return out


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def _multiply_kernel(  # type: ignore[no-untyped-def]  # as above
    table,
    rows,
    weight,
    out,
    num_out,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.program_id(0) * 3
    expert = tl.load(table + block).to(tl.int64)
    row = tl.load(table + block + 1) + tl.arange(0, BLOCK)
    is_row = (row < tl.load(table + block + 2))[:, None]
    row = row.to(tl.int64)[:, None]
    col = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]

    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for k in range(0, K, BLOCK):
        ks = k + tl.arange(0, BLOCK)
        x = tl.load(
            rows + row * K + ks[None, :], mask=is_row & (ks < K)[None, :], other=0.0
        )
        y = tl.load(
            weight + (expert * K + ks[:, None]) * num_out + col,
            mask=(ks < K)[:, None] & (col < num_out),
            other=0.0,
        )
        total = tl.dot(x, y, total, input_precision=PRECISION)

    at = out + row * num_out + col
    tl.store(at, total.to(out.dtype.element_ty), mask=is_row & (col < num_out))


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def _sum_outer_kernel(  # type: ignore[no-untyped-def]  # as above
    table,
    rows,
    grads,
    out,
    num_in,
    num_out,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    expert = tl.program_id(0)
    begin, end = tl.load(table + expert), tl.load(table + expert + 1)
    ins = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    outs = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)[None, :]

    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    # The interpreter takes no tensor as the end of a range.
    while begin < end:
        row = begin + tl.arange(0, BLOCK)
        wide = row.to(tl.int64)
        x = tl.load(
            rows + wide[None, :] * num_in + ins,
            mask=(row < end)[None, :] & (ins < num_in),
            other=0.0,
        )
        y = tl.load(
            grads + wide[:, None] * num_out + outs,
            mask=(row < end)[:, None] & (outs < num_out),
            other=0.0,
        )
        total = tl.dot(x, y, total, input_precision=PRECISION)
        begin += BLOCK

    at = out + (expert.to(tl.int64) * num_in + ins) * num_out + outs
    is_inside = (ins < num_in) & (outs < num_out)
    tl.store(at, total.to(out.dtype.element_ty), mask=is_inside)
