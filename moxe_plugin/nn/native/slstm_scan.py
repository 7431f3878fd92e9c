"""The sLSTM cell over whole sequences, in C++.

The same function as :func:`~moxe_plugin.nn.slstm_cell.slstm_sequence`, whose docstrings
have the equations, but on rows without padding, which the products around it make and
read as they are. Under autocast, its products are as those of
:mod:`moxe_plugin.nn.products`: of factors rounded to bfloat16, where that is possible.

What has a row for each position may be kept in bfloat16, where products in C++ multiply
it. Then the arithmetic is that of autocast, and each number is rounded where it is
written; what the cells remember is float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from moxe_plugin.nn.autocast import recalls_autocast, remembers_autocast
from moxe_plugin.nn.native.library import find_function, pointers_to
from moxe_plugin.nn.native.products import find_rounding, find_suffix
from moxe_plugin.nn.native.row_products import ColumnProduct
from moxe_plugin.nn.products import rounds_factors
from moxe_plugin.nn.ragged_products import multiply_columns


class RowScanInputs(NamedTuple):
    """What the scan reads, all of one dtype, float32 or float64, on the CPU.

    Or bfloat16, but for ``bias``, ``c``, ``log_n`` and ``y``, which are float32 then.
    """

    gates_if: Tensor
    """The inputs' share of the pre-activations of i and f. *Shape:* ``(C,H*2D)``."""

    gates_zo: Tensor
    """The same of z and o. *Shape:* ``(C,H*2D)``."""

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


class RowBounds(NamedTuple):
    """Where sequences stand in the C rows: expert by expert, without a gap."""

    counts: list[int]
    """The rows of each expert, C in all."""

    begins: Tensor
    """The first row of each sequence, int64. *Shape:* ``(E,N)``."""

    lens: Tensor
    """The length of each, 0 allowed, int64. *Shape:* ``(E,N)``."""

    padded_len: int
    """If each sequence has this many rows, of which those from its length on are
    padding: how many. Else 0."""


def slstm_scan(
    inputs: RowScanInputs, bounds: RowBounds
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the cells over all steps.

    :param inputs: Gates and memory.
    :param bounds: Which rows are a sequence.

    :returns: The outputs ``(C,H*D)``, of the gates' type and 0 at padding, and ``c``,
        ``log_n`` and ``y`` after the last valid position, ``(E,N,H,D)`` each.

    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    return _SLSTMScan.apply(bounds, *inputs)  # type: ignore[no-any-return, no-untyped-call]  # torch leaves apply untyped


class ScanResults(NamedTuple):
    """What :func:`scan_rows` returns."""

    outputs: Tensor
    """*Shape:* ``(C,H*D)``."""

    activations: Tensor | None
    """What :func:`scan_rows_backward` wants: w (or 1 - w), 1 - sigmoid(f), tanh(z),
    sigmoid(o), tanh(z) - c'/n'. *Shape:* ``(C,H,5,D)``."""

    last: list[Tensor]
    """``c``, ``log_n`` and ``y`` after the last valid position. *Shape:* ``(E,N,H,D)``
    each."""


class ScanGradients(NamedTuple):
    """The gradients of :class:`RowScanInputs`."""

    gates_if: Tensor
    gates_zo: Tensor
    bias: Tensor
    recurrent_weight: Tensor
    memory: list[Tensor]


def scan_rows(
    inputs: RowScanInputs, bounds: RowBounds, *, wants_grad: bool
) -> ScanResults:
    """Compute :func:`slstm_scan` without a gradient.

    :param inputs: As there, contiguous.
    :param bounds: As there.
    :param wants_grad: Whether :func:`scan_rows_backward` is going to be called.

    :returns: The results.
    """
    gates_if, _, bias, weight, *memory = inputs
    num_rows = gates_if.size(0)
    num_heads, _, head_dim = bias.shape[1:]

    outputs = gates_if.new_empty(num_rows, num_heads * head_dim)
    last = [torch.empty_like(x) for x in memory]
    activations = None
    if wants_grad:
        activations = gates_if.new_empty(num_rows, num_heads, 5, head_dim)

    _call("forward", weight, bounds, *inputs, outputs, activations, *last)

    return ScanResults(outputs, activations, last)


def scan_rows_backward(
    grad_outputs: Tensor,
    grad_last: Sequence[Tensor],
    weight: Tensor,
    y: Tensor,
    outputs: Tensor,
    activations: Tensor,
    bounds: RowBounds,
) -> ScanGradients:
    """Compute the gradients of :func:`scan_rows`.

    :param grad_outputs: That of the outputs; contiguous. *Shape:* ``(C,H*D)``.
    :param grad_last: Those of what comes after; contiguous. *Shape:* ``(E,N,H,D)``
        each.
    :param weight: R, as there.
    :param y: As there.
    :param outputs: What it has returned.
    :param activations: Likewise.
    :param bounds: As there.

    :returns: The gradients.
    """
    num_heads, head_dim = y.shape[2:]

    grad_if = outputs.new_empty(outputs.size(0), 2 * num_heads * head_dim)
    grad_zo = torch.empty_like(grad_if)
    grad_memory = [torch.empty_like(y) for _ in range(3)]

    # Of some sequences each: (E,H,B,4,D)
    num_blocks = -(-y.size(1) // seqs_of_sum())
    grad_bias = y.new_empty(*weight.shape[:2], num_blocks, *weight.shape[3:])

    _call(
        *("backward", weight, bounds),
        *(weight, outputs, activations, grad_outputs, *grad_last),
        *(grad_if, grad_zo, grad_bias, *grad_memory),
    )

    old = torch.empty_like(outputs)
    _call("shift", weight, bounds, outputs, y, old)

    halves = (grad_if, grad_zo)

    return ScanGradients(
        *halves,
        grad_bias.sum(dim=2),
        _multiply_old_outputs(old, halves, weight, bounds),
        grad_memory,
    )


@cache
def seqs_of_sum() -> int:
    """Tell of how many sequences gradients of a bias are summed in C++.

    :returns: The number, of each expert but for the last sum.

    :raises NativeLibraryError: The C++ code cannot be compiled here.
    """
    return int(find_function("slstm_scan", "moxe_slstm_rows_of_task")())


class _SLSTMScan(Function):
    @staticmethod
    @remembers_autocast
    def forward(ctx: Any, bounds: RowBounds, *args: Tensor) -> tuple[Tensor, ...]:
        inputs = RowScanInputs(*(x.contiguous() for x in args))

        results = scan_rows(inputs, bounds, wants_grad=any(ctx.needs_input_grad))

        ctx.save_for_backward(
            *(inputs.recurrent_weight, inputs.y),
            *(results.outputs, results.activations),
        )
        ctx.bounds = bounds

        return results.outputs, *results.last

    @staticmethod
    @recalls_autocast
    @once_differentiable
    def backward(
        ctx: Any, grad_outputs: Tensor, *grad_last: Tensor
    ) -> tuple[Tensor | None, ...]:
        *grads, grad_memory = scan_rows_backward(
            grad_outputs.contiguous(),
            [x.contiguous() for x in grad_last],
            *(*ctx.saved_tensors, ctx.bounds),
        )

        return None, *grads, *grad_memory


def _multiply_old_outputs(
    old: Tensor, halves: Sequence[Tensor], weight: Tensor, bounds: RowBounds
) -> Tensor:
    grad_weight = torch.empty_like(weight)

    # (E,H,D,2,D) -> (E,H,D,2*D)
    multiply_columns(
        [
            ColumnProduct(old, half, grads.flatten(-2))
            for half, grads in zip(halves, grad_weight.chunk(2, dim=3), strict=True)
        ],
        bounds.counts,
    )

    return grad_weight


def _call(
    direction: str, weight: Tensor, bounds: RowBounds, *tensors: Tensor | None
) -> None:
    num_experts, num_heads, head_dim = weight.shape[:3]
    num_seqs = bounds.begins.size(1)
    shape = (num_experts, num_heads, num_seqs, bounds.padded_len, head_dim)

    # Each of `tensors` lives until the call returns: the caller holds them.
    find_function("slstm_scan", f"moxe_slstm_{direction}_{_find_suffix(weight)}")(
        (ctypes.c_int64 * len(shape))(*shape),
        ctypes.c_int(torch.get_num_threads()),
        *pointers_to(bounds.begins, bounds.lens, *tensors),
    )


def _find_suffix(weight: Tensor) -> str:
    rounds = weight.dtype == torch.float32 and rounds_factors(weight)

    return find_suffix(weight.dtype, find_rounding(rounds=rounds))
