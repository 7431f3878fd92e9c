"""The sLSTM cell over a whole sequence, in C++.

The same function as :func:`~moxe_plugin.nn.slstm_cell.slstm_sequence`, whose docstrings
have the equations, but with the tensors laid out as the products around it make them,
and with padding left out instead of gates that are closed.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moxe_plugin.nn.native.library import load_library
from moxe_plugin.nn.products import multiply

_SUFFIXES = {torch.float32: "float", torch.float64: "double"}


class SLSTMScanInputs(NamedTuple):
    """What the scan reads, all of one dtype, float32 or float64, on the CPU."""

    gates_if: Tensor
    """The inputs' share of the pre-activations of i and f. *Shape:* ``(E,H,N,S,2D)``.
    """

    gates_zo: Tensor
    """The same of z and o. *Shape:* ``(E,H,N,S,2D)``."""

    bias: Tensor
    """The bias of i, f, z, o. *Shape:* ``(E,H,4,D)``."""

    recurrent_weight: Tensor
    """R, input first. *Shape:* ``(E,H,D,4,D)``."""

    c: Tensor
    """See :class:`~moxe_plugin.nn.slstm_cell.SLSTMMemory`. *Shape:* ``(E,N,H,D)``."""

    log_n: Tensor
    """As ``c``."""

    y: Tensor
    """As ``c``."""


def slstm_scan(
    inputs: SLSTMScanInputs, seq_lens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the cells over all steps.

    :param inputs: Gates and memory.
    :param seq_lens: Where right padding begins; ``None`` without padding. *Shape:*
        ``(E,N)``.

    :returns: The outputs ``(E,N,S,H,D)``, 0 at padding, and ``c``, ``log_n`` and ``y``
        after the last valid position, ``(E,N,H,D)`` each.

    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    lens = None if seq_lens is None else seq_lens.long().contiguous()

    return _SLSTMScan.apply(lens, *inputs)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped


class _SLSTMScan(Function):
    @staticmethod
    def forward(ctx: Any, lens: Tensor | None, *args: Tensor) -> tuple[Tensor, ...]:
        gates_if, gates_zo, bias, weight, *memory = (x.contiguous() for x in args)
        num_experts, num_heads, num_rows, num_steps, _ = gates_if.shape
        head_dim = bias.size(-1)

        outputs = gates_if.new_empty(
            num_experts, num_rows, num_steps, num_heads, head_dim
        )
        last = [torch.empty_like(x) for x in memory]
        # w, 1 - sigmoid(f), tanh(z), sigmoid(o); and c
        activations, cs = None, None
        if any(ctx.needs_input_grad):
            positions = (num_experts, num_heads, num_rows, num_steps)
            activations = gates_if.new_empty(*positions, 4, head_dim)
            cs = gates_if.new_empty(*positions, head_dim)

        _call(
            "forward",
            (num_experts, num_heads, num_rows, num_steps, head_dim),
            *(lens, gates_if, gates_zo, bias, weight, *memory),
            *(outputs, activations, cs, *last),
            dtype=gates_if.dtype,
        )

        c, _, y = memory
        ctx.save_for_backward(lens, weight, c, y, outputs, activations, cs)

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

        grad_if = outputs.new_empty(*positions, 2 * head_dim)
        grad_zo = torch.empty_like(grad_if)
        grad_memory = [torch.empty_like(c) for _ in range(3)]

        # (E,H,D,4,D) -> (E,H,4*D,D)
        transposed = weight.flatten(-2).mT.contiguous()

        _call(
            "backward",
            (*positions, head_dim),
            *(lens, transposed, c, outputs, activations, cs),
            *(x.contiguous() for x in (grad_outputs, grad_c, grad_log_n, grad_y)),
            *(grad_if, grad_zo, *grad_memory),
            dtype=outputs.dtype,
        )

        # (E,N,S,H,D) -> (E,H,N*S,D): the outputs that each step reads
        old = torch.cat([y.unsqueeze(2), outputs], dim=2)[:, :, :num_steps]
        old = old.permute(0, 3, 4, 1, 2).flatten(-2)

        halves = [x.flatten(2, 3) for x in (grad_if, grad_zo)]
        grad_weight = torch.cat([multiply(old, x) for x in halves], dim=-1)
        grad_bias = torch.cat([x.sum(dim=2) for x in halves], dim=-1)

        return (
            None,
            grad_if,
            grad_zo,
            grad_bias.unflatten(-1, (4, head_dim)),
            grad_weight.unflatten(-1, (4, head_dim)),
            *grad_memory,
        )


def _call(
    direction: str,
    shape: tuple[int, ...],
    lens: Tensor | None,
    *tensors: Tensor | None,
    dtype: torch.dtype,
) -> None:
    function = load_library("slstm_scan")[f"moxe_slstm_{direction}_{_SUFFIXES[dtype]}"]

    # Each of `tensors` lives until the call returns: the caller holds them.
    pointers = [
        ctypes.c_void_p(None if x is None else x.data_ptr()) for x in (lens, *tensors)
    ]

    function(
        (ctypes.c_int64 * len(shape))(*shape),
        ctypes.c_int(torch.get_num_threads()),
        *pointers,
    )
