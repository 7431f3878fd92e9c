"""The sLSTM cell over a whole sequence, as one Triton kernel for each direction.

The equations of :mod:`moxe_plugin.nn.slstm_cell`; but a row costs nothing after its
end, while :func:`~moxe_plugin.nn.slstm_cell.slstm_sequence` wants gates that are closed
there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moxe_plugin.nn.slstm_cell import SLSTMScanInputs
from moxe_plugin.nn.triton.slstm_launch import scan_backward, scan_forward


def slstm_scan(
    inputs: SLSTMScanInputs, seq_lens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the cells over all steps.

    States and activations are float32. R is multiplied in its own precision; y and the
    gates' gradients are rounded to it for these products only.

    :param inputs: Gates of any precision but float64; R of float32, bfloat16 or
        float16; a memory of float32.
    :param seq_lens: Where right padding begins; ``None`` without padding. *Shape:*
        ``(E,N)``.

    :returns: The outputs ``(E,N,S,H,D)``, 0 at padding, and ``c``, ``log_n`` and ``y``
        after the last valid position, ``(E,N,H,D)`` each; all float32.
    """
    gates = inputs.gates_if

    if seq_lens is None:
        num_experts, _, num_rows, num_steps, _ = gates.shape
        lens = gates.new_full((num_experts, num_rows), num_steps, dtype=torch.int32)
    else:
        lens = seq_lens.int().contiguous()

    return _SLSTMScan.apply(lens, *inputs)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped


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
