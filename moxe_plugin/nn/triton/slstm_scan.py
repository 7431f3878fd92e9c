"""The sLSTM cell over a whole sequence, as one Triton kernel for each direction.

The equations of :mod:`moxe_plugin.nn.slstm_cell`; but a row costs nothing after its
end, while :func:`~moxe_plugin.nn.slstm_cell.slstm_sequence` wants gates that are closed
there.

Where R stays on chip, as :func:`runs_on_chip` tells, the kernels are those of training,
:mod:`.slstm_rows_tiles`; else those of :mod:`.slstm_kernels`, which read R at each
step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moxe_plugin.nn.backend import has_shared_memory
from moxe_plugin.nn.slstm_cell import SLSTMScanInputs
from moxe_plugin.nn.triton import slstm_rows_launch
from moxe_plugin.nn.triton.slstm_launch import scan_backward, scan_forward
from moxe_plugin.nn.triton.slstm_rows import supports
from moxe_plugin.nn.triton.slstm_rows_launch import Segments, weight_grad


def runs_on_chip(weight: Tensor) -> bool:
    """Tell whether R stays on chip.

    :param weight: R. *Shape:* ``([E,]H,D,4,D)``.

    :returns: Whether it is of 16 bits and of a width that the kernels have
        (:func:`~moxe_plugin.nn.triton.slstm_rows.supports`), and its GPU has an H100's
        shared memory.
    """
    return supports(weight.size(-1), weight.dtype) and has_shared_memory(weight.device)


def slstm_scan(
    inputs: SLSTMScanInputs, seq_lens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the cells over all steps.

    States and activations are float32. R is multiplied in its own precision; y and the
    gates' gradients are rounded to it for these products only. Where R stays on chip,
    the outputs are rounded to it, too, and so are the gradients that are returned.

    :param inputs: Gates of any precision but float64; R of float32, bfloat16 or
        float16; a memory of float32.
    :param seq_lens: Where right padding begins; ``None`` without padding. *Shape:*
        ``(E,N)``.

    :returns: The outputs ``(E,N,S,H,D)``, 0 at padding, in R's type where it stays on
        chip, else float32; and ``c``, ``log_n`` and ``y`` after the last valid
        position, ``(E,N,H,D)`` each, float32.
    """
    gates = inputs.gates_if
    num_experts, num_heads, num_rows, num_steps, _ = gates.shape
    weight = inputs.recurrent_weight

    if runs_on_chip(weight):
        segments = _find_segments(gates, seq_lens)
        # (E,H,N,S,2D) -> (C,H*2D), a view of what a block computes
        rows = [
            x.movedim(1, 3).flatten(3).flatten(0, 2)
            for x in (inputs.gates_if, inputs.gates_zo)
        ]
        outputs, *last = _SLSTMRowScan.apply(segments, *rows, *inputs[2:])  # type: ignore[no-untyped-call]  # torch leaves apply untyped
        shape = (num_experts, num_rows, num_steps, num_heads, weight.size(-1))

        return outputs.view(shape), *last

    if seq_lens is None:
        lens = gates.new_full((num_experts, num_rows), num_steps, dtype=torch.int32)
    else:
        lens = seq_lens.int().contiguous()

    return _SLSTMScan.apply(lens, *inputs)  # type: ignore[no-any-return, no-untyped-call]  # as above


def _find_segments(gates: Tensor, seq_lens: Tensor | None) -> Segments:
    num_experts, _, num_seqs, num_steps, _ = gates.shape
    counts = [num_seqs * num_steps] * num_experts
    num_bounds = num_experts * num_seqs + 1
    bounds = torch.arange(num_bounds, dtype=torch.int32, device=gates.device)
    bounds *= num_steps

    if seq_lens is not None:
        begins = bounds[:-1]
        bounds = torch.stack([begins, begins + seq_lens.flatten().int()], dim=1)

    return Segments(bounds, num_seqs, counts)


class _SLSTMRowScan(Function):
    @staticmethod
    def forward(
        ctx: Any,
        segments: Segments,
        *args: Tensor,
    ) -> tuple[Tensor, ...]:
        gates_if, gates_zo, bias, weight, *memory = (x.contiguous() for x in args)

        outputs, saved, last = slstm_rows_launch.scan_forward(
            *((gates_if, gates_zo), bias, weight, segments, memory),
            saves=any(ctx.needs_input_grad),
        )

        ctx.save_for_backward(weight, memory[0], *saved)
        ctx.segments, ctx.dtypes = segments, (gates_if.dtype, bias.dtype)

        return outputs, *last

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_outputs: Tensor, *grad_last: Tensor
    ) -> tuple[Tensor | None, ...]:
        weight, first_c, before, gates, cs = ctx.saved_tensors
        segments: Segments = ctx.segments
        gates_dtype, bias_dtype = ctx.dtypes

        grad_inputs, grad_bias, grad_memory = slstm_rows_launch.scan_backward(
            *(weight, segments, gates, cs, grad_outputs.contiguous(), first_c),
            [x.contiguous() for x in grad_last],
        )

        return (
            None,
            *grad_inputs.to(gates_dtype),
            grad_bias.to(bias_dtype),
            weight_grad(before, grad_inputs, weight, segments),
            *grad_memory,
        )


class _SLSTMScan(Function):
    @staticmethod
    def forward(ctx: Any, lens: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
        gates_if, gates_zo, bias, weight, c, log_n, y = (x.contiguous() for x in args)
        num_experts, num_heads, num_rows, num_steps, _ = gates_if.shape
        head_dim = bias.size(-1)

        # What the kernel does not write, at padding, stays 0.
        outputs = c.new_zeros(num_experts, num_rows, num_steps, num_heads, head_dim)
        # The kernel advances these in place.
        last = [x.clone() for x in (c, log_n, y)]
        # w, 1 - sigmoid(f), tanh(z), sigmoid(o); and c
        activations, cs = None, None
        if any(ctx.needs_input_grad):
            positions = (num_experts, num_heads, num_rows, num_steps)
            activations = c.new_empty(*positions, 4, head_dim)
            cs = c.new_empty(*positions, head_dim)

        scan_forward(
            lens, gates_if, gates_zo, bias, weight, outputs, activations, cs, *last
        )

        ctx.save_for_backward(lens, weight, c, y, outputs, activations, cs)
        ctx.gates_dtype = gates_if.dtype

        return outputs, *last

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_outputs: Tensor,
        grad_c: Tensor,
        grad_log_n: Tensor,
        grad_y: Tensor,
    ) -> tuple[Tensor | None, ...]:
        lens, weight, c, y, outputs, activations, cs = ctx.saved_tensors
        num_experts, num_rows, num_steps, num_heads, head_dim = outputs.shape
        positions = (num_experts, num_heads, num_rows, num_steps)

        grad_if = outputs.new_zeros(*positions, 2 * head_dim)
        grad_zo = torch.zeros_like(grad_if)
        # The kernel takes these back to the first position in place.
        grad_memory = [
            x.clone(memory_format=torch.contiguous_format)
            for x in (grad_c, grad_log_n, grad_y)
        ]

        # (E,H,D,4,D) -> (E,H,4*D,D)
        transposed = weight.flatten(-2).mT.contiguous()

        scan_backward(
            *(lens, transposed, c, outputs, activations, cs),
            *(grad_outputs.contiguous(), grad_if, grad_zo, *grad_memory),
        )

        # (E,N,S,H,D) -> (E,H,N*S,D): the outputs that each step reads
        old = torch.cat([y.unsqueeze(2), outputs], dim=2)[:, :, :num_steps]
        old = old.permute(0, 3, 4, 1, 2).flatten(-2)

        halves = [x.flatten(2, 3) for x in (grad_if, grad_zo)]
        grad_weight = torch.cat([old @ x for x in halves], dim=-1)
        grad_bias = torch.cat([x.sum(dim=2) for x in halves], dim=-1)

        return (
            None,
            grad_if.to(ctx.gates_dtype),
            grad_zo.to(ctx.gates_dtype),
            grad_bias.unflatten(-1, (4, head_dim)),
            grad_weight.unflatten(-1, (4, head_dim)).to(weight.dtype),
            *grad_memory,
        )
