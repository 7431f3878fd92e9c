"""Sums over the choices of each token, and their gradients, as Triton kernels.

Rows are of at most two banks, whose tensors need not lie one behind the other. Sums are
taken in float32 and in the order of the choices, so that they are always the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moxe_plugin.nn.triton.launching import Launcher
from moxe_plugin.nn.triton.sizes import ceil_div

_BLOCK_TOKENS = 16
_BLOCK_COLS = 128


def sum_choices(
    banks: Sequence[Tensor],
    weights: Tensor | None,
    row_of_choice: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """Sum the rows of each token's choices.

    :param banks: The rows of each bank, in which the last stride is 1. *Shape:*
        ``(C,M)`` each, C may differ.
    :param weights: What to multiply them by; nothing if ``None``. *Shape:* ``(T,K)``.
    :param row_of_choice: The row of each choice among those of all banks, int32; -1 if
        it was not sent, which adds nothing. *Shape:* ``(T,K)``.
    :param out_dtype: The type of the sums.

    :returns: *Shape:* ``(T,M)``.
    """
    first, second = banks[0], banks[-1]
    num_tokens, top_k = row_of_choice.shape
    width = first.size(1)
    out = torch.empty(num_tokens, width, dtype=out_dtype, device=first.device)

    if out.numel() > 0:
        grid = (
            ceil_div(num_tokens, _BLOCK_TOKENS),
            ceil_div(width, _BLOCK_COLS),
        )
        _sum_choices_kernel[grid](
            *(first, second),
            # Without weights any pointer does: nothing is loaded.
            row_of_choice if weights is None else weights.contiguous(),
            *(row_of_choice, out),
            *(first.size(0), first.stride(0), second.stride(0), num_tokens),
            TOP_K=top_k,
            WIDTH=width,
            HAS_WEIGHTS=weights is not None,
            BLOCK_TOKENS=_BLOCK_TOKENS,
            BLOCK_COLS=_BLOCK_COLS,
        )

    return out


def sum_choices_backward(
    grad_out: Tensor,
    banks: Sequence[Tensor],
    weights: Tensor,
    row_of_choice: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of :func:`sum_choices`.

    Every row must be that of a choice.

    :param grad_out: In which the last stride is 1. *Shape:* ``(T,M)``.
    :param banks: As there.
    :param weights: As there. *Shape:* ``(T,K)``.
    :param row_of_choice: As there. *Shape:* ``(T,K)``.

    :returns: The gradients of the rows of all banks, of the type of these, ``(C,M)``,
        and that of the weights, ``(T,K)``.
    """
    first, second = banks[0], banks[-1]
    num_rows = sum(bank.size(0) for bank in banks)
    num_choices, width = row_of_choice.numel(), first.size(1)

    grad_rows = first.new_empty(num_rows, width)
    grad_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)

    if num_choices > 0:
        _spread_choices_kernel[(ceil_div(num_choices, _BLOCK_TOKENS),)](
            *(grad_out, first, second, weights.contiguous(), row_of_choice),
            *(grad_rows, grad_weights),
            *(first.size(0), num_choices),
            *(grad_out.stride(0), first.stride(0), second.stride(0)),
            TOP_K=row_of_choice.size(1),
            WIDTH=width,
            BLOCK_CHOICES=_BLOCK_TOKENS,
            BLOCK_COLS=_BLOCK_COLS,
        )

    return grad_rows, grad_weights


@triton.jit
def _row_starts(  # type: ignore[no-untyped-def]  # Triton has no annotations
    first, second, boundary, first_stride, second_stride, row
):
    row = row.to(tl.int64)

    return tl.where(
        row < boundary,
        first + row * first_stride,
        second + (row - boundary) * second_stride,
    )


# The numbers of rows differ from step to step: that they can be divided by 16, or are
# 1, is not worth another compilation.
@Launcher
@triton.jit(do_not_specialize=["boundary"])  # type: ignore[untyped-decorator]  # as above
def _sum_choices_kernel(  # type: ignore[no-untyped-def]  # as above
    first,
    second,
    weights,
    row_of_choice,
    out,
    boundary,
    first_stride,
    second_stride,
    num_tokens,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_token = token < num_tokens
    cols = (tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS))[None, :]

    total = tl.zeros((BLOCK_TOKENS, BLOCK_COLS), tl.float32)
    for k in tl.static_range(TOP_K):
        choice = token * TOP_K + k
        row = tl.load(row_of_choice + choice, mask=is_token, other=-1)
        starts = _row_starts(first, second, boundary, first_stride, second_stride, row)
        values = tl.load(
            starts[:, None] + cols,
            mask=(row >= 0)[:, None] & (cols < WIDTH),
            other=0.0,
        ).to(tl.float32)
        if HAS_WEIGHTS:
            weight = tl.load(weights + choice, mask=is_token, other=0.0)
            values *= weight.to(tl.float32)[:, None]
        total += values

    at = out + token.to(tl.int64)[:, None] * WIDTH + cols
    tl.store(
        at,
        total.to(out.dtype.element_ty),
        mask=is_token[:, None] & (cols < WIDTH),
    )


@Launcher
@triton.jit(do_not_specialize=["boundary"])  # type: ignore[untyped-decorator]  # as above
def _spread_choices_kernel(  # type: ignore[no-untyped-def]  # as above
    grad_out,
    first,
    second,
    weights,
    row_of_choice,
    grad_rows,
    grad_weights,
    boundary,
    num_choices,
    grad_stride,
    first_stride,
    second_stride,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_CHOICES: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    choice = tl.program_id(0) * BLOCK_CHOICES + tl.arange(0, BLOCK_CHOICES)
    is_choice = choice < num_choices
    row = tl.load(row_of_choice + choice, mask=is_choice, other=-1)
    is_sent = (row >= 0)[:, None]
    weight = tl.load(weights + choice, mask=is_choice, other=0.0).to(tl.float32)

    grads_at = (grad_out + (choice // TOP_K).to(tl.int64) * grad_stride)[:, None]
    values_at = _row_starts(first, second, boundary, first_stride, second_stride, row)[
        :, None
    ]
    out_at = (grad_rows + row.to(tl.int64) * WIDTH)[:, None]

    product = tl.zeros((BLOCK_CHOICES, BLOCK_COLS), tl.float32)
    for col in range(0, WIDTH, BLOCK_COLS):
        cols = (col + tl.arange(0, BLOCK_COLS))[None, :]
        mask = is_sent & (cols < WIDTH)
        grads = tl.load(grads_at + cols, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(values_at + cols, mask=mask, other=0.0).to(tl.float32)
        product += grads * values
        tl.store(
            out_at + cols,
            (grads * weight[:, None]).to(grad_rows.dtype.element_ty),
            mask=mask,
        )

    tl.store(
        grad_weights + choice,
        tl.sum(product, 1).to(grad_weights.dtype.element_ty),
        mask=is_choice,
    )
