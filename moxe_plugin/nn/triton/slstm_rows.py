"""The sLSTM cell over ragged rows, in Triton, for training: no memory comes or goes.

The equations of :mod:`moxe_plugin.nn.slstm_cell`; :mod:`.slstm_rows_tiles` tells how,
and :mod:`.slstm_scan` has the same with a memory.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moxe_plugin.nn.ragged import RaggedRows
from moxe_plugin.nn.triton.sizes import split_head_dim
from moxe_plugin.nn.triton.slstm_rows_launch import (
    scan_backward,
    scan_forward,
    segments_of,
    weight_grad,
)

_MAX_SHARED_BYTES: Final = 208 * 1024
"""What R may take of an H100's 227 kB; the rest is for what is multiplied with it."""


def supports(head_dim: int, dtype: torch.dtype) -> bool:
    """Tell whether R stays on chip.

    :param head_dim: The width D of a head.
    :param dtype: The type of R.

    :returns: Whether it is bfloat16 or float16 and small enough, and D a power of two
        or the sum of two, from 16 on.
    """
    return (
        dtype in (torch.bfloat16, torch.float16)
        and split_head_dim(head_dim) is not None
        and 4 * head_dim**2 * dtype.itemsize <= _MAX_SHARED_BYTES
    )


def slstm_rows(
    inputs: Tensor, bias: Tensor, weight: Tensor, rows: RaggedRows
) -> Tensor:
    """Run the cells over all segments, each from an empty memory.

    States are float32; outputs and the gates' gradients are rounded to R's type.

    :param inputs: The inputs' share of the pre-activations: of i and f, and of z and o;
        contiguous. *Shape:* ``(2,C,H*2*D)``.
    :param bias: Of i, f, z, o. *Shape:* ``(E,H,4,D)``.
    :param weight: R, input first; see :func:`supports`. *Shape:* ``(E,H,D,4,D)``.
    :param rows: Where rows stand.

    :returns: The outputs, in R's type. *Shape:* ``(C,H*D)``.
    """
    return _SLSTMRows.apply(inputs, bias, weight, rows)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped


class _SLSTMRows(Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        bias: Tensor,
        weight: Tensor,
        rows: RaggedRows,
    ) -> Tensor:
        weight = weight.contiguous()

        outputs, saved, _ = scan_forward(
            inputs.unbind(),
            bias,
            weight,
            segments_of(rows),
            saves=any(ctx.needs_input_grad),
        )

        ctx.save_for_backward(weight, *saved)
        ctx.rows, ctx.bias_dtype = rows, bias.dtype
        ctx.inputs_dtype = inputs.dtype

        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        before, gates, cs = saved
        segments = segments_of(ctx.rows)

        grad_inputs, grad_bias, _ = scan_backward(
            weight, segments, gates, cs, grad_outputs.contiguous()
        )

        return (
            grad_inputs.to(ctx.inputs_dtype),
            grad_bias.to(ctx.bias_dtype),
            weight_grad(before, grad_inputs, weight, segments),
            None,
        )
