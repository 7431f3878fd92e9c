"""The blocks' causal convolution and its SiLU on rows: one pass over memory each way.

Imports triton, so it is imported by who runs it only.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor

from moxe_plugin.nn.ragged import RaggedRows
from moxe_plugin.nn.triton.partials import PartialSums
from moxe_plugin.nn.triton.row_conv_kernels import (
    conv_backward_kernel,
    conv_forward_kernel,
)
from moxe_plugin.nn.triton.sizes import ceil_div

KERNEL_SIZE: Final = 4
"""The number of taps K: the kernels have a name for each."""

# On an H200, of 16,384 rows of 1,280: 105 us with 128 rows, 124 with 64, 151 with 32.
_BLOCK_ROWS = 128
# Half as many programs would not fill a GPU where rows are narrow.
_FORWARD_BLOCK_ROWS = 32
_BLOCK_COLS = 128
_NARROW_BLOCK_COLS = 64
"""Backward, of rows of less than ``_WIDE``: of 640, 67 instead of 83 us."""

_WIDE = 1024
# Four columns a thread: with fewer, addresses take most registers, and as many bytes on
# their way as the memory needs would take more threads than registers allow.
_NUM_WARPS = 1


def causal_conv_silu_forward(
    flat: Tensor, weight: Tensor, bias: Tensor, rows: RaggedRows
) -> Tensor:
    """Convolve each segment and apply SiLU.

    ``silu(bias_e + sum_k weight_ek * x_{c-(K-1)+k})``, k = 0..K-1, where e is the
    expert of row c, and x is 0 before the segment. In float32, rounded once.

    :param flat: The inputs; the last stride is 1. *Shape:* ``(C,M)``.
    :param weight: The taps, contiguous; the last one is the present. *Shape:*
        ``([E,]K,M)``.
    :param bias: Contiguous. *Shape:* ``([E,]M)``.
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
        conv_forward_kernel[_grid(num_rows, width, _FORWARD_BLOCK_ROWS, _BLOCK_COLS)](
            *(flat, weight, bias, out),
            *(rows.begins, rows.segment_of_row, rows.step_of_row),
            *(num_rows, rows.num_seqs, width, flat.stride(0)),
            ROWS=_FORWARD_BLOCK_ROWS,
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
    sums: PartialSums,
    *,
    out: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """Compute the gradients of :func:`causal_conv_silu_forward`.

    :param grad_output: The gradient of the result; the last stride is 1, as everywhere.
        *Shape:* ``(C,M)``.
    :param flat: As there, and so are ``weight``, ``bias`` and ``rows``.
    :param weight: As there.
    :param bias: As there.
    :param rows: As there.
    :param sums: Gets the gradients of weight and bias.
    :param out: Where the gradient of the inputs goes, and not what is read here; a new
        tensor if ``None``. *Shape:* ``(C,M)``.
    :param add: What is added to it before it is rounded. It may be ``out``. *Shape:*
        ``(C,M)``.

    :returns: The gradient of the inputs.
    """
    num_rows, width = flat.shape

    if out is None:
        out = flat.new_empty(num_rows, width)

    partials = sums.new_slots(_BLOCK_ROWS, (weight, bias))

    if num_rows:
        # Without one, any pointer does: nothing is read.
        added = out if add is None else add
        cols = _BLOCK_COLS if width >= _WIDE else _NARROW_BLOCK_COLS
        conv_backward_kernel[_grid(num_rows, width, _BLOCK_ROWS, cols)](
            *(grad_output, flat, weight, bias, added, out, partials),
            *(rows.begins, rows.segment_of_row, rows.step_of_row),
            *(num_rows, rows.num_seqs, width),
            *(grad_output.stride(0), flat.stride(0), added.stride(0), out.stride(0)),
            ADDS=add is not None,
            ROWS=_BLOCK_ROWS,
            COLS=cols,
            num_warps=_NUM_WARPS,
        )

    return out


def _grid(num_rows: int, width: int, block_rows: int, block_cols: int) -> tuple[int]:
    return (ceil_div(num_rows, block_rows) * ceil_div(width, block_cols),)
