"""How the kernels of the sLSTM on rows are launched."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from moxe_plugin.nn.native.row_products import ColumnProduct
from moxe_plugin.nn.ragged import RaggedRows
from moxe_plugin.nn.ragged_products import multiply_columns
from moxe_plugin.nn.triton.sizes import ceil_div, power_of_two, split_head_dim
from moxe_plugin.nn.triton.slstm_rows_backward import slstm_backward_kernel
from moxe_plugin.nn.triton.slstm_rows_forward import slstm_forward_kernel
from moxe_plugin.nn.triton.tile_products import is_interpreted

_STEPS_AHEAD: Final = 2
"""By how many steps kernels ask for what they will read; on an H200, 1 to 8 are as
fast."""


class Segments(NamedTuple):
    """Which of C rows are a sequence of an expert."""

    bounds: Tensor
    """The first row of each segment and the one after its last, int32: where each but
    the last ends the next one begins ``(E*N+1)``, or there may be padding between them
    ``(E*N,2)``."""

    num_seqs: int
    """The number of sequences N."""

    counts: Sequence[int]
    """The rows of each expert with padding, C in all."""

    @property
    def num_rows(self) -> int:
        """The number of rows C."""
        return sum(self.counts)

    @property
    def num_experts(self) -> int:
        """The number of experts E."""
        return len(self.counts)


def segments_of(rows: RaggedRows) -> Segments:
    """Tell the same without the rest.

    :param rows: Where rows stand.

    :returns: The segments.
    """
    return Segments(rows.begins, rows.num_seqs, rows.counts)


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
    inputs: Sequence[Tensor],
    bias: Tensor,
    weight: Tensor,
    segments: Segments,
    memory: Sequence[Tensor] = (),
    *,
    saves: bool,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Launch the forward kernel.

    :param inputs: The inputs' share of the pre-activations: of i and f, and of z and o;
        contiguous. *Shape:* ``(C,H*2*D)`` each.
    :param bias: *Shape:* ``(E,H,4,D)``.
    :param weight: R, contiguous. *Shape:* ``(E,H,D,4,D)``.
    :param segments: Which rows are a sequence.
    :param memory: c, log_n and y before the first step, float32 and contiguous; nothing
        if they are empty, and those after the last are not wanted. *Shape:*
        ``(E,N,H,D)`` each.
    :param saves: Whether a backward pass is to come.

    :returns: The outputs in R's type, 0 at padding, ``(C,H*D)``, :class:`SavedSteps`,
        or nothing, and the memory after the last step, if one is given.
    """
    num_heads, head_dim = weight.shape[1:3]
    width = num_heads * head_dim

    outputs = _new_rows(weight, segments, width)
    saved: tuple[Tensor, ...] = ()
    if saves:
        gates = bias.new_empty(segments.num_rows, 4 * width, dtype=torch.float32)
        cs = gates.new_empty(segments.num_rows, width)
        saved = SavedSteps(_new_rows(weight, segments, width), gates, cs)

    last = tuple([torch.empty_like(x) for x in memory])

    if segments.num_seqs > 0:
        block = _choose_block(segments, num_heads)
        grid = ceil_div(segments.num_seqs, block), num_heads, segments.num_experts
        # Where there is nothing to read, or to write, any pointer does.
        slstm_forward_kernel[grid](
            *(segments.bounds, *inputs, bias.contiguous(), weight),
            *(memory or (weight, weight, weight)),
            *(outputs, *(saved or (outputs, outputs, outputs))),
            *(last or (outputs, outputs, outputs)),
            *(num_heads, segments.num_seqs),
            SAVES=saves,
            LINES=2 * power_of_two(ceil_div(2 * head_dim, 64)),
            **_constants(head_dim, block, segments, has_memory=bool(memory)),
        )

    return outputs, saved, last


def scan_backward(
    weight: Tensor,
    segments: Segments,
    gates: Tensor,
    cs: Tensor,
    grad_outputs: Tensor,
    first_c: Tensor | None = None,
    grad_last: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Launch the backward kernel.

    :param weight: As for :func:`scan_forward`.
    :param segments: As there.
    :param gates: See :class:`SavedSteps`.
    :param cs: See :class:`SavedSteps`.
    :param grad_outputs: Contiguous. *Shape:* ``(C,H*D)``.
    :param first_c: c before the first step, where a memory was given.
    :param grad_last: The gradients of the last c, log_n and y, likewise, contiguous.
        *Shape:* ``(E,N,H,D)`` each.

    :returns: The gradients of the inputs, in R's type, ``(2,C,H*2*D)``, of the bias,
        ``(E,H,4,D)``, and of the memory, if one was given.
    """
    num_experts, num_heads, head_dim = weight.shape[:3]
    block = _choose_block(segments, num_heads)
    num_blocks = ceil_div(segments.num_seqs, block)

    grad_inputs = _new_rows(weight, segments, num_heads * 2 * head_dim, 2)
    grad_bias = cs.new_empty(num_experts, num_heads, num_blocks, 4, head_dim)
    grad_memory = tuple([torch.empty_like(x) for x in grad_last])

    if num_blocks > 0:
        slstm_backward_kernel[(num_blocks, num_heads, num_experts)](
            *(segments.bounds, weight, gates, cs),
            *(cs if first_c is None else first_c, grad_outputs),
            *(grad_last or (cs, cs, cs)),
            *(grad_inputs, grad_bias, *(grad_memory or (cs, cs, cs))),
            *(num_heads, segments.num_seqs, grad_inputs.stride(0)),
            LINES=power_of_two(ceil_div(head_dim, 32)),
            **_constants(head_dim, block, segments, has_memory=first_c is not None),
        )

    return grad_inputs, grad_bias.sum(2), grad_memory


def weight_grad(
    before: Tensor, grad_inputs: Tensor, weight: Tensor, segments: Segments
) -> Tensor:
    """Compute the gradient of R.

    :param before: See :class:`SavedSteps`.
    :param grad_inputs: As :func:`scan_backward` returned it.
    :param weight: R, contiguous.
    :param segments: Which rows are a sequence.

    :returns: *Shape:* ``(E,H,D,4,D)``.
    """
    num_experts, num_heads, head_dim = weight.shape[:3]
    grad = torch.empty_like(weight)
    # (E,H,D,4,D) -> (E,H,D,2,2D)
    by_pair = grad.view(num_experts, num_heads, head_dim, 2, 2 * head_dim)
    multiply_columns(
        [
            ColumnProduct(before, grads, part)
            for grads, part in zip(grad_inputs, by_pair.unbind(3), strict=True)
        ],
        segments.counts,
    )

    return grad


def _new_rows(weight: Tensor, segments: Segments, width: int, *planes: int) -> Tensor:
    # Kernels do not write at padding.
    has_padding = segments.bounds.ndim == 2
    allocate = weight.new_zeros if has_padding else weight.new_empty

    return allocate(*planes, segments.num_rows, width)


def _choose_block(segments: Segments, num_heads: int) -> int:
    # The fewer segments a program has, the faster it is through a step; but all
    # programs should run at once, one on a multiprocessor. Triton gives the tensor
    # cores no fewer than 16 columns: 4 segments four times, or backward two halves
    # twice.
    num_blocks = ceil_div(segments.num_seqs, 4)
    num_programs = num_blocks * num_heads * segments.num_experts
    all_run = num_programs <= count_multiprocessors(segments.bounds.device)

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


def _constants(
    head_dim: int, block: int, segments: Segments, *, has_memory: bool
) -> dict[str, Any]:
    parts = split_head_dim(head_dim)
    assert parts is not None
    body, tail = parts

    return {
        "D": head_dim,
        "P": body,
        "Q": tail,
        "BLOCK_N": block,
        # Pairs, or ends that are beginnings
        "STEP": segments.bounds.ndim,
        "HAS_MEMORY": has_memory,
        "AHEAD": _STEPS_AHEAD,
        "INTERPRETED": is_interpreted(),
        # A gate's rows of the body then lie in the same threads for all gates.
        "num_warps": max(body // 16, 4),
    }
