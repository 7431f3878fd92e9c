"""The sLSTM cell over ragged rows, in Triton, for training: no memory comes or goes.

The equations of :mod:`moxe_plugin.nn.slstm_cell`; :mod:`.slstm_rows_tiles` tells how.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moxe_plugin.nn.ragged import RaggedRows
from moxe_plugin.nn.ragged_products import multiply_columns
from moxe_plugin.nn.triton.sizes import ceil_div, power_of_two
from moxe_plugin.nn.triton.slstm_rows_backward import slstm_backward_kernel
from moxe_plugin.nn.triton.slstm_rows_forward import slstm_forward_kernel
from moxe_plugin.nn.triton.tile_products import is_interpreted

_MAX_SHARED_BYTES: Final = 208 * 1024
"""What R may take of an H100's 227 kB; the rest is for what is multiplied with it."""


_STEPS_AHEAD: Final = 2
"""By how many steps kernels ask for what they will read; on an H200, 1 to 8 are as
fast."""


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


def split_head_dim(head_dim: int) -> tuple[int, int] | None:
    """Split a width into those of two tiles, which Triton has in powers of two only.

    :param head_dim: The width D of a head.

    :returns: Two powers of two from 16 on, the first the larger, or one and 0; nothing
        where D is no such sum.
    """
    body = 1 << (head_dim.bit_length() - 1)
    tail = head_dim - body

    if body < 16 or tail & (tail - 1) or 0 < tail < 16:
        return None

    return body, tail


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

        outputs, saved = scan_forward(
            inputs, bias, weight, rows, saves=any(ctx.needs_input_grad)
        )

        ctx.save_for_backward(weight, *saved)
        ctx.rows, ctx.bias_dtype = rows, bias.dtype
        ctx.inputs_dtype = inputs.dtype

        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        rows: RaggedRows = ctx.rows
        before, gates, cs = saved

        grad_inputs, grad_bias = scan_backward(
            weight, rows, gates, cs, grad_outputs.contiguous()
        )

        num_experts, num_heads, head_dim = weight.shape[:3]
        grad_weight = torch.empty_like(weight)
        # (E,H,D,4,D) -> (E,H,D,2,2D)
        by_pair = grad_weight.view(num_experts, num_heads, head_dim, 2, 2 * head_dim)
        for grads, part in zip(grad_inputs, by_pair.unbind(3), strict=True):
            multiply_columns(before, grads, part, rows.counts)

        return (
            grad_inputs.to(ctx.inputs_dtype),
            grad_bias.to(ctx.bias_dtype),
            grad_weight,
            None,
        )


class SavedSteps(NamedTuple):
    """What the backward pass of the cells needs."""

    before: Tensor
    """What each row was multiplied with: the output one step before. *Shape:*
    ``(C,H*D)``."""

    gates: Tensor
    """w, 1 - sigmoid(f), tanh(z) and sigmoid(o) of each channel, float32. *Shape:*
    ``(C,H*D*4)``."""

    cs: Tensor
    """c, float32. *Shape:* ``(C,H*D)``."""


def scan_forward(
    inputs: Tensor,
    bias: Tensor,
    weight: Tensor,
    rows: RaggedRows,
    *,
    saves: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Launch the forward kernel.

    :param inputs: See :func:`slstm_rows`.
    :param bias: See :func:`slstm_rows`.
    :param weight: Contiguous.
    :param rows: See :func:`slstm_rows`.
    :param saves: Whether a backward pass is to come.

    :returns: The outputs in R's type, and :class:`SavedSteps`, or nothing.
    """
    num_heads, head_dim = weight.shape[1:3]
    width = num_heads * head_dim

    outputs = weight.new_empty(rows.num_rows, width)
    saved: tuple[Tensor, ...] = ()
    if saves:
        gates = weight.new_empty(rows.num_rows, 4 * width, dtype=torch.float32)
        cs = gates.new_empty(rows.num_rows, width)
        saved = SavedSteps(torch.empty_like(outputs), gates, cs)

    if rows.max_len > 0:
        block = _choose_block(rows, num_heads)
        grid = ceil_div(rows.num_seqs, block), num_heads, rows.num_experts
        slstm_forward_kernel[grid](
            *(rows.begins, inputs, bias.contiguous(), weight, outputs),
            # Without them any pointer does: nothing is stored.
            *(saved or (outputs, outputs, outputs)),
            *(num_heads, rows.num_seqs, inputs.stride(0)),
            SAVES=saves,
            LINES=2 * power_of_two(ceil_div(2 * head_dim, 64)),
            **_constants(head_dim, block),
        )

    return outputs, saved


def scan_backward(
    weight: Tensor, rows: RaggedRows, gates: Tensor, cs: Tensor, grad_outputs: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel.

    :param weight: Contiguous.
    :param rows: See :func:`slstm_rows`.
    :param gates: See :class:`SavedSteps`.
    :param cs: See :class:`SavedSteps`.
    :param grad_outputs: Contiguous. *Shape:* ``(C,H*D)``.

    :returns: The gradients of the inputs, in R's type, and of the bias, ``(E,H,4,D)``.
    """
    num_experts, num_heads, head_dim = weight.shape[:3]
    block = _choose_block(rows, num_heads)
    num_blocks = ceil_div(rows.num_seqs, block)

    grad_inputs = weight.new_empty(2, rows.num_rows, num_heads * 2 * head_dim)
    grad_bias = cs.new_empty(num_experts, num_heads, num_blocks, 4, head_dim)

    slstm_backward_kernel[(num_blocks, num_heads, num_experts)](
        *(rows.begins, weight, gates, cs, grad_outputs, grad_inputs, grad_bias),
        *(num_heads, rows.num_seqs, grad_inputs.stride(0)),
        LINES=power_of_two(ceil_div(head_dim, 32)),
        **_constants(head_dim, block),
    )

    return grad_inputs, grad_bias.sum(2)


def _choose_block(rows: RaggedRows, num_heads: int) -> int:
    # The fewer segments a program has, the faster it is through a step; but all
    # programs should run at once, one on a multiprocessor. Triton gives the tensor
    # cores no fewer than 16 columns: 4 segments four times, or backward two halves
    # twice.
    num_blocks = ceil_div(rows.num_seqs, 4)
    num_programs = num_blocks * num_heads * rows.num_experts
    all_run = num_programs <= count_multiprocessors(rows.begins.device)

    return 4 if all_run or num_blocks == 1 else 8


@lru_cache(maxsize=16)
def count_multiprocessors(device: torch.device) -> int:
    """Count what programs run on.

    :param device: The device.

    :returns: The number of a GPU's multiprocessors, and for a CPU that of an H100.
    """
    if device.type != "cuda":
        return 132

    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _constants(head_dim: int, block: int) -> dict[str, Any]:
    parts = split_head_dim(head_dim)
    assert parts is not None
    body, tail = parts

    return {
        "D": head_dim,
        "P": body,
        "Q": tail,
        "BLOCK_N": block,
        "AHEAD": _STEPS_AHEAD,
        "INTERPRETED": is_interpreted(),
        # A gate's rows of the body then lie in the same threads for all gates.
        "num_warps": max(body // 16, 4),
    }
