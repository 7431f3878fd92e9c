"""The gate of a feed-forward network on rows: one pass over memory each way.

Imports triton, so it is imported by who runs it only.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moxe_plugin.nn.triton.launching import Launcher
from moxe_plugin.nn.triton.sizes import ceil_div

_BLOCK_ROWS = 32
_BLOCK_COLS = 64


def silu_product_forward(projected: Tensor) -> Tensor:
    """Compute ``silu(gate) * value``.

    In float32, rounded once.

    :param projected: Gate and value of each row, side by side; the last stride is 1.
        *Shape:* ``(C,2F)``.

    :returns: *Shape:* ``(C,F)``.
    """
    num_rows, width = projected.size(0), projected.size(1) // 2
    out = projected.new_empty(num_rows, width)

    if num_rows:
        _silu_product_kernel[_grid(num_rows, width)](
            *(projected, out, num_rows, width, projected.stride(0)),
            ROWS=_BLOCK_ROWS,
            COLS=_BLOCK_COLS,
        )

    return out


def silu_product_backward(grad_output: Tensor, projected: Tensor) -> Tensor:
    """Compute the gradient of the projection.

    :param grad_output: The gradient of the product; its last stride is 1. *Shape:*
        ``(C,F)``.
    :param projected: As in :func:`silu_product_forward`.

    :returns: *Shape:* ``(C,2F)``.
    """
    num_rows, width = grad_output.shape
    out = projected.new_empty(num_rows, 2 * width)

    if num_rows:
        _silu_product_grad_kernel[_grid(num_rows, width)](
            *(grad_output, projected, out, num_rows, width),
            *(grad_output.stride(0), projected.stride(0)),
            ROWS=_BLOCK_ROWS,
            COLS=_BLOCK_COLS,
        )

    return out


def _grid(num_rows: int, width: int) -> tuple[int, int]:
    return ceil_div(num_rows, _BLOCK_ROWS), ceil_div(width, _BLOCK_COLS)


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def _place(num_rows, width, ROWS: tl.constexpr, COLS: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]

    return row.to(tl.int64), col, (row < num_rows) & (col < width)


@Launcher
@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]  # as above
def _silu_product_kernel(  # type: ignore[no-untyped-def]  # as above
    projected, out, num_rows, width, stride, ROWS: tl.constexpr, COLS: tl.constexpr
):
    row, col, is_in = _place(num_rows, width, ROWS, COLS)
    at = projected + row * stride + col
    gate = tl.load(at, mask=is_in, other=0.0).to(tl.float32)
    value = tl.load(at + width, mask=is_in, other=0.0).to(tl.float32)

    product = gate * tl.sigmoid(gate) * value
    tl.store(out + row * width + col, product.to(out.dtype.element_ty), mask=is_in)


@Launcher
@triton.jit(do_not_specialize=["num_rows"])  # type: ignore[untyped-decorator]  # as above
def _silu_product_grad_kernel(  # type: ignore[no-untyped-def]  # as above
    grad_output,
    projected,
    out,
    num_rows,
    width,
    grad_stride,
    stride,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row, col, is_in = _place(num_rows, width, ROWS, COLS)
    at = projected + row * stride + col
    gate = tl.load(at, mask=is_in, other=0.0).to(tl.float32)
    value = tl.load(at + width, mask=is_in, other=0.0).to(tl.float32)
    grad = tl.load(grad_output + row * grad_stride + col, mask=is_in, other=0.0)
    grad = grad.to(tl.float32)

    sigmoid = tl.sigmoid(gate)
    grad_value = grad * gate * sigmoid
    grad_gate = grad * value * sigmoid * (1 + gate * (1 - sigmoid))

    at = out + row * 2 * width + col
    tl.store(at, grad_gate.to(out.dtype.element_ty), mask=is_in)
    tl.store(at + width, grad_value.to(out.dtype.element_ty), mask=is_in)
