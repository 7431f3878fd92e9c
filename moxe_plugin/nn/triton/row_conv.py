"""The blocks' causal convolution and its SiLU on rows: one pass over memory each way.

A program walks down some rows of some columns. What earlier rows give to later ones, or
in the backward pass get from them, it keeps in registers: the last K-1 inputs, and the
gradients of the last K-1 inputs, which are not complete yet. It runs up to K-1 rows
into what is another program's, for these. Where the expert changes it begins again.

Imports triton, so it is imported by who runs it only.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moxe_plugin.nn.ragged import RaggedRows
from moxe_plugin.nn.triton.partials import new_partials, sum_partials

KERNEL_SIZE: Final = 4
"""The number of taps K: the kernels have a name for each."""

_BLOCK_ROWS = 64
_BLOCK_COLS = 128
_NUM_WARPS = 2


def causal_conv_silu(
    flat: Tensor, weight: Tensor, bias: Tensor, rows: RaggedRows
) -> Tensor:
    """Convolve each segment and apply SiLU; differentiable once.

    ``silu(bias_e + sum_k weight_ek * x_{c-(K-1)+k})``, k = 0..K-1, where e is the
    expert of row c, and x is 0 before the segment. In float32, rounded once.

    :param flat: The inputs; the last stride is 1. *Shape:* ``(C,M)``.
    :param weight: The taps; the last one is the present. *Shape:* ``([E,]K,M)``.
    :param bias: *Shape:* ``([E,]M)``.
    :param rows: The rows.

    :returns: *Shape:* ``(C,M)``.

    :raises ValueError: K is not 4.
    """
    return _CausalConvSiLU.apply(flat, weight, bias, rows)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped


def causal_conv_silu_forward(
    flat: Tensor, weight: Tensor, bias: Tensor, rows: RaggedRows
) -> Tensor:
    """Compute what :func:`causal_conv_silu` does, without a gradient.

    :param flat: As there, and so are the other parameters.
    :param weight: Contiguous.
    :param bias: Contiguous.
    :param rows: The rows.

    :returns: *Shape:* ``(C,M)``.

    :raises ValueError: K is not 4.
    """
    if weight.size(-2) != KERNEL_SIZE:
        raise ValueError(
            f"`weight` must have {KERNEL_SIZE} taps, but has {weight.size(-2)} instead."
        )

    num_rows, width = flat.shape
    out = flat.new_empty(num_rows, width)

    if num_rows:
        _forward_kernel[_grid(num_rows, width)](
            *(flat, weight, bias, out),
            *(rows.begins, rows.segment_of_row, rows.step_of_row),
            *(num_rows, rows.num_seqs, width, flat.stride(0)),
            ROWS=_BLOCK_ROWS,
            COLS=_BLOCK_COLS,
            num_warps=_NUM_WARPS,
        )

    return out


def causal_conv_silu_backward(
    grad_output: Tensor,
    flat: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: RaggedRows,
    *,
    out: Tensor | None = None,
    add: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients.

    :param grad_output: The gradient of the result; the last stride is 1, as everywhere.
        *Shape:* ``(C,M)``.
    :param flat: As in :func:`causal_conv_silu`.
    :param weight: Contiguous.
    :param bias: Contiguous.
    :param rows: The rows.
    :param out: Where the gradient of the inputs goes, and not what is read here; a new
        tensor if ``None``. *Shape:* ``(C,M)``.
    :param add: What is added to it before it is rounded. It may be ``out``. *Shape:*
        ``(C,M)``.

    :returns: The gradients of inputs, weight and bias; the last two are views of the
        same tensor.
    """
    num_rows, width = flat.shape

    if out is None:
        out = flat.new_empty(num_rows, width)

    partials = new_partials(rows, _BLOCK_ROWS, (KERNEL_SIZE + 1) * width)

    if num_rows:
        # Without one, any pointer does: nothing is read.
        added = out if add is None else add
        _backward_kernel[_grid(num_rows, width)](
            *(grad_output, flat, weight, bias, added, out, partials),
            *(rows.begins, rows.segment_of_row, rows.step_of_row),
            *(num_rows, rows.num_seqs, width),
            *(grad_output.stride(0), flat.stride(0), added.stride(0), out.stride(0)),
            ADDS=add is not None,
            ROWS=_BLOCK_ROWS,
            COLS=_BLOCK_COLS,
            num_warps=_NUM_WARPS,
        )

    sums = sum_partials(partials, rows, _BLOCK_ROWS, weight.dtype)
    of_weight, of_bias = sums.split([KERNEL_SIZE * width, width], dim=1)

    return out, of_weight.view(weight.shape), of_bias.view(bias.shape)


class _CausalConvSiLU(Function):
    @staticmethod
    def forward(
        ctx: Any, flat: Tensor, weight: Tensor, bias: Tensor, rows: RaggedRows
    ) -> Tensor:
        weight, bias = weight.contiguous(), bias.contiguous()
        ctx.save_for_backward(flat, weight, bias)
        ctx.rows = rows

        return causal_conv_silu_forward(flat, weight, bias, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        # What a sum or an expansion hands back has strides of 0.
        if grad_output.stride(1) != 1:
            grad_output = grad_output.contiguous()

        grads = causal_conv_silu_backward(grad_output, *ctx.saved_tensors, ctx.rows)

        return (*grads, None)


def _grid(num_rows: int, width: int) -> tuple[int]:
    return (triton.cdiv(num_rows, _BLOCK_ROWS) * triton.cdiv(width, _BLOCK_COLS),)


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def _place(width, COLS: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    # Of the same rows, columns after columns
    num_tiles = tl.cdiv(width, COLS)
    program = tl.program_id(0)

    return program // num_tiles, program % num_tiles * COLS + tl.arange(0, COLS)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _load_row(tensor, row, stride, col, mask):  # type: ignore[no-untyped-def]  # as above
    at = tensor + row.to(tl.int64) * stride + col
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _load_taps(weight, bias, expert, width, col, mask):  # type: ignore[no-untyped-def]  # as above
    at = weight + expert.to(tl.int64) * 4 * width + col
    w0 = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    w1 = tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
    w2 = tl.load(at + 2 * width, mask=mask, other=0.0).to(tl.float32)
    w3 = tl.load(at + 3 * width, mask=mask, other=0.0).to(tl.float32)

    return w0, w1, w2, w3, _load_row(bias, expert, width, col, mask)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _load_window(flat, row, step, stride, col, mask):  # type: ignore[no-untyped-def]  # as above
    # Where the step is k, there are k rows of the segment before.
    x0 = _load_row(flat, row - 3, stride, col, mask & (step >= 3))
    x1 = _load_row(flat, row - 2, stride, col, mask & (step >= 2))
    x2 = _load_row(flat, row - 1, stride, col, mask & (step >= 1))

    return x0, x1, x2


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _convolve(x0, x1, x2, x3, w0, w1, w2, w3, b):  # type: ignore[no-untyped-def]  # as above
    return b + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _begin(x0, x1, x2, step):  # type: ignore[no-untyped-def]  # as above
    # Before a segment's first row there is nothing.
    is_first = step == 0
    x0 = tl.where(is_first, 0.0, x0)
    x1 = tl.where(is_first, 0.0, x1)
    x2 = tl.where(is_first, 0.0, x2)

    return x0, x1, x2


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _store_silu(out, row, width, col, mask, y):  # type: ignore[no-untyped-def]  # as above
    at = out + row.to(tl.int64) * width + col
    tl.store(at, (y * tl.sigmoid(y)).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]  # as above
def _forward_kernel(  # type: ignore[no-untyped-def]  # as above
    flat,
    weight,
    bias,
    out,
    begins,
    segment_of_row,
    step_of_row,
    num_rows,
    num_seqs,
    width,
    stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    block, col = _place(width, COLS)
    is_col = col < width
    row = block * ROWS
    last = tl.minimum(row + ROWS, num_rows)
    expert = tl.load(segment_of_row + row) // num_seqs

    while row < last:
        end = tl.minimum(last, tl.load(begins + (expert + 1) * num_seqs))
        w0, w1, w2, w3, b = _load_taps(weight, bias, expert, width, col, is_col)
        step = tl.load(step_of_row + row)
        x0, x1, x2 = _load_window(flat, row, step, stride, col, is_col)

        # Four rows are on their way at the same time.
        while row < end:
            is_1, is_2, is_3 = row + 1 < end, row + 2 < end, row + 3 < end
            a0 = _load_row(flat, row, stride, col, is_col)
            a1 = _load_row(flat, row + 1, stride, col, is_col & is_1)
            a2 = _load_row(flat, row + 2, stride, col, is_col & is_2)
            a3 = _load_row(flat, row + 3, stride, col, is_col & is_3)
            s0 = tl.load(step_of_row + row)
            s1 = tl.load(step_of_row + row + 1, mask=is_1, other=0)
            s2 = tl.load(step_of_row + row + 2, mask=is_2, other=0)
            s3 = tl.load(step_of_row + row + 3, mask=is_3, other=0)

            x0, x1, x2 = _begin(x0, x1, x2, s0)
            y = _convolve(x0, x1, x2, a0, w0, w1, w2, w3, b)
            _store_silu(out, row, width, col, is_col, y)
            x0, x1, x2 = _begin(x1, x2, a0, s1)
            y = _convolve(x0, x1, x2, a1, w0, w1, w2, w3, b)
            _store_silu(out, row + 1, width, col, is_col & is_1, y)
            x0, x1, x2 = _begin(x1, x2, a1, s2)
            y = _convolve(x0, x1, x2, a2, w0, w1, w2, w3, b)
            _store_silu(out, row + 2, width, col, is_col & is_2, y)
            x0, x1, x2 = _begin(x1, x2, a2, s3)
            y = _convolve(x0, x1, x2, a3, w0, w1, w2, w3, b)
            _store_silu(out, row + 3, width, col, is_col & is_3, y)
            x0, x1, x2 = x1, x2, a3
            row += 4

        row = end
        expert += 1


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _grad_of_sum(grad, y):  # type: ignore[no-untyped-def]  # as above
    sigmoid = tl.sigmoid(y)
    return grad * sigmoid * (1 + y * (1 - sigmoid))


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _hand_back(d0, d1, d2, dy, step, w0, w1, w2, w3):  # type: ignore[no-untyped-def]  # as above
    # What a row gives to itself and to those before, as far as its segment reaches.
    d0 += tl.where(step >= 3, w0 * dy, 0.0)
    d1 += tl.where(step >= 2, w1 * dy, 0.0)
    d2 += tl.where(step >= 1, w2 * dy, 0.0)

    return d0, d1, d2, w3 * dy


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _add_up(g0, g1, g2, g3, g4, x0, x1, x2, x3, dy, is_own):  # type: ignore[no-untyped-def]  # as above
    dy = tl.where(is_own, dy, 0.0)

    return g0 + x0 * dy, g1 + x1 * dy, g2 + x2 * dy, g3 + x3 * dy, g4 + dy


@triton.jit  # type: ignore[untyped-decorator]  # as above
def _store_row(out, row, stride, col, mask, x):  # type: ignore[no-untyped-def]  # as above
    at = out + row.to(tl.int64) * stride + col
    tl.store(at, x.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]  # as above
def _backward_kernel(  # type: ignore[no-untyped-def]  # as above
    grad,
    flat,
    weight,
    bias,
    added,
    out,
    partials,
    begins,
    segment_of_row,
    step_of_row,
    num_rows,
    num_seqs,
    width,
    grad_stride,
    stride,
    added_stride,
    out_stride,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    block, col = _place(width, COLS)
    is_col = col < width
    first = block * ROWS
    last = tl.minimum(first + ROWS, num_rows)
    expert = tl.load(segment_of_row + first) // num_seqs

    while first < last:
        end = tl.minimum(last, tl.load(begins + (expert + 1) * num_seqs))
        # Rows that may hand something back to the last of these
        limit = tl.minimum(end + 3, num_rows)
        w0, w1, w2, w3, b = _load_taps(weight, bias, expert, width, col, is_col)
        step = tl.load(step_of_row + first)
        x0, x1, x2 = _load_window(flat, first, step, stride, col, is_col)

        # The gradients of the three inputs before, and of taps and bias
        d0 = tl.zeros((COLS,), tl.float32)
        d1, d2 = d0, d0
        g0, g1, g2, g3, g4 = d0, d0, d0, d0, d0

        row = first
        while row < end + 3:
            is_0, is_1 = is_col & (row < limit), is_col & (row + 1 < limit)
            is_2, is_3 = is_col & (row + 2 < limit), is_col & (row + 3 < limit)
            a0 = _load_row(flat, row, stride, col, is_0)
            a1 = _load_row(flat, row + 1, stride, col, is_1)
            a2 = _load_row(flat, row + 2, stride, col, is_2)
            a3 = _load_row(flat, row + 3, stride, col, is_3)
            u0 = _load_row(grad, row, grad_stride, col, is_0)
            u1 = _load_row(grad, row + 1, grad_stride, col, is_1)
            u2 = _load_row(grad, row + 2, grad_stride, col, is_2)
            u3 = _load_row(grad, row + 3, grad_stride, col, is_3)
            s0 = tl.load(step_of_row + row, mask=row < limit, other=0)
            s1 = tl.load(step_of_row + row + 1, mask=row + 1 < limit, other=0)
            s2 = tl.load(step_of_row + row + 2, mask=row + 2 < limit, other=0)
            s3 = tl.load(step_of_row + row + 3, mask=row + 3 < limit, other=0)

            # What becomes complete: the gradients of the rows three before
            is_0 = is_col & (row - 3 >= first) & (row - 3 < end)
            is_1 = is_col & (row - 2 >= first) & (row - 2 < end)
            is_2 = is_col & (row - 1 >= first) & (row - 1 < end)
            is_3 = is_col & (row < end)
            if ADDS:
                v0 = _load_row(added, row - 3, added_stride, col, is_0)
                v1 = _load_row(added, row - 2, added_stride, col, is_1)
                v2 = _load_row(added, row - 1, added_stride, col, is_2)
                v3 = _load_row(added, row, added_stride, col, is_3)
            else:
                v0, v1, v2, v3 = 0.0, 0.0, 0.0, 0.0

            x0, x1, x2 = _begin(x0, x1, x2, s0)
            dy = _grad_of_sum(u0, _convolve(x0, x1, x2, a0, w0, w1, w2, w3, b))
            done, d0, d1, d2 = _hand_back(d0, d1, d2, dy, s0, w0, w1, w2, w3)
            _store_row(out, row - 3, out_stride, col, is_0, done + v0)
            g0, g1, g2, g3, g4 = _add_up(
                g0, g1, g2, g3, g4, x0, x1, x2, a0, dy, row < end
            )

            x0, x1, x2 = _begin(x1, x2, a0, s1)
            dy = _grad_of_sum(u1, _convolve(x0, x1, x2, a1, w0, w1, w2, w3, b))
            done, d0, d1, d2 = _hand_back(d0, d1, d2, dy, s1, w0, w1, w2, w3)
            _store_row(out, row - 2, out_stride, col, is_1, done + v1)
            g0, g1, g2, g3, g4 = _add_up(
                g0, g1, g2, g3, g4, x0, x1, x2, a1, dy, row + 1 < end
            )

            x0, x1, x2 = _begin(x1, x2, a1, s2)
            dy = _grad_of_sum(u2, _convolve(x0, x1, x2, a2, w0, w1, w2, w3, b))
            done, d0, d1, d2 = _hand_back(d0, d1, d2, dy, s2, w0, w1, w2, w3)
            _store_row(out, row - 1, out_stride, col, is_2, done + v2)
            g0, g1, g2, g3, g4 = _add_up(
                g0, g1, g2, g3, g4, x0, x1, x2, a2, dy, row + 2 < end
            )

            x0, x1, x2 = _begin(x1, x2, a2, s3)
            dy = _grad_of_sum(u3, _convolve(x0, x1, x2, a3, w0, w1, w2, w3, b))
            done, d0, d1, d2 = _hand_back(d0, d1, d2, dy, s3, w0, w1, w2, w3)
            _store_row(out, row, out_stride, col, is_3, done + v3)
            g0, g1, g2, g3, g4 = _add_up(
                g0, g1, g2, g3, g4, x0, x1, x2, a3, dy, row + 3 < end
            )

            x0, x1, x2 = x1, x2, a3
            row += 4

        # An expert without a row has no slot of its own in the middle of a block.
        if end > first:
            at = partials + (block + expert).to(tl.int64) * 5 * width + col
            tl.store(at, g0, mask=is_col)
            tl.store(at + width, g1, mask=is_col)
            tl.store(at + 2 * width, g2, mask=is_col)
            tl.store(at + 3 * width, g3, mask=is_col)
            tl.store(at + 4 * width, g4, mask=is_col)

        first = end
        expert += 1
