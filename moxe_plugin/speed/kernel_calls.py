"""Each kernel and its reference in torch, ready to be called on the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from moxe_plugin.nn import mlstm_cell, slstm_cell
from moxe_plugin.nn.padding import EMPTY
from moxe_plugin.nn.slstm_cell import SLSTMScanInputs
from moxe_plugin.speed.kernel_cases import KernelCase

Results: TypeAlias = Sequence[Tensor]

Call: TypeAlias = Callable[[], Results]

_FORGET_BIAS: Final = 3.0
"""Where the mLSTM's forget gates begin in training."""


class KernelCalls(NamedTuple):
    """Two ways to the same; each returns the output and, in ``train``, gradients."""

    kernel: Call
    """In Triton."""

    reference: Call
    """In torch."""

    align: Callable[[Results], Results] = list
    """Brings the reference's results into the kernel's layout."""


def prepare_kernel_calls(
    case: KernelCase, dtype: torch.dtype, device: torch.device, seed: int
) -> KernelCalls:
    """Draw inputs and make both calls.

    The references compute as our layers do in torch: the mLSTM in chunks of the best
    size, the sLSTM in float32 with the batch last, experts' products one by one. How
    inputs get there is not part of a call.

    :param case: The case.
    :param dtype: The type of the kernel's inputs.
    :param device: Where they are.
    :param seed: Seeds the inputs.

    :returns: The calls.
    """
    draw = _Draw(torch.Generator(device).manual_seed(seed), dtype, device)
    prepare = {"mlstm": _prepare_mlstm, "slstm": _prepare_slstm}

    return prepare.get(case.kernel, _prepare_grouped)(case, draw)


class _Draw(NamedTuple):
    generator: torch.Generator
    dtype: torch.dtype
    device: torch.device

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device)

        return (values * std).to(self.dtype)


def _prepare_mlstm(case: KernelCase, draw: _Draw) -> KernelCalls:
    from moxe_plugin.nn.triton import mlstm as kernels

    shape = (case.num_experts, case.num_rows, case.num_heads, case.length)
    inputs = [draw.normal(*shape, case.dim) for _ in range(3)]
    inputs += [draw.normal(*shape).float() for _ in range(2)]
    inputs[4] += _FORGET_BIAS
    grad = draw.normal(*shape, case.dim)
    best = mlstm_cell.best_chunk_size(case.length, case.dim)

    def run(chunkwise: Callable[..., tuple[Tensor, object]], chunk_size: int) -> Call:
        return _differentiate(
            case,
            lambda *x: chunkwise(*x, chunk_size=chunk_size, return_memory=False)[0],
            inputs,
            grad,
        )

    return KernelCalls(
        run(kernels.mlstm_chunkwise, kernels.MAX_CHUNK_SIZE),
        run(mlstm_cell.mlstm_chunkwise, best),
    )


def _prepare_slstm(case: KernelCase, draw: _Draw) -> KernelCalls:
    from moxe_plugin.nn.triton.slstm_scan import slstm_scan

    e, n, s, h, d = (
        *(case.num_experts, case.num_rows, case.length),
        *(case.num_heads, case.dim),
    )
    halves = [draw.normal(e, h, n, s, 2 * d) for _ in range(2)]
    weight = draw.normal(e, h, d, 4, d, std=d**-0.5)
    bias = torch.zeros(e, h, 4, d, device=draw.device)
    memory = [torch.zeros(e, n, h, d, device=draw.device) for _ in range(3)]
    memory[1] += EMPTY
    grad = draw.normal(e, n, s, h, d).float()

    def scan(gates_if: Tensor, gates_zo: Tensor, weight: Tensor) -> Tensor:
        inputs = SLSTMScanInputs(gates_if, gates_zo, bias, weight, *memory)

        return slstm_scan(inputs, None)[0]

    # (E,H,N,S,2D) twice -> (S,E*H,4,D,N)
    gates = torch.cat([x.unflatten(-1, (2, d)) for x in halves], dim=-2).float()
    gates = gates.flatten(0, 1).permute(2, 0, 3, 4, 1).contiguous()
    flat_memory = slstm_cell.SLSTMMemory(
        # (E,N,H,D) -> (E*H,D,N)
        *(x.permute(0, 2, 3, 1).flatten(0, 1).contiguous() for x in memory)
    )

    def loop(gates: Tensor, weight: Tensor) -> Tensor:
        outputs, *_ = slstm_cell.slstm_sequence(gates, weight, flat_memory)

        # (S,E*H,D,N) -> (E,N,S,H,D), a view
        return torch.unflatten(outputs, 1, (e, h)).permute(1, 4, 0, 2, 3)

    def align(results: Results) -> Results:
        output, *grads = results
        if not grads:
            return results

        # (S,E*H,4,D,N) -> two of (E,H,N,S,2D)
        grad_gates = grads[0].permute(1, 4, 0, 2, 3).flatten(-2).unflatten(0, (e, h))

        return [output, *grad_gates.chunk(2, dim=-1), grads[1].unflatten(0, (e, h))]

    return KernelCalls(
        _differentiate(case, scan, [*halves, weight], grad),
        _differentiate(case, loop, [gates, weight.float().flatten(0, 1)], grad),
        align,
    )


def _prepare_grouped(case: KernelCase, draw: _Draw) -> KernelCalls:
    from moxe_plugin.nn.triton.grouped import grouped_product

    counts = [case.num_rows] * case.num_experts
    rows = draw.normal(sum(counts), case.dim)
    weight = draw.normal(case.num_experts, case.dim, case.out_dim, std=case.dim**-0.5)
    grad = draw.normal(sum(counts), case.out_dim)

    def multiply(rows: Tensor, weight: Tensor) -> Tensor:
        return grouped_product(rows, weight, counts)

    def loop(rows: Tensor, weight: Tensor) -> Tensor:
        parts = zip(rows.split(counts), weight, strict=True)

        return torch.cat([x @ w for x, w in parts])

    return KernelCalls(
        _differentiate(case, multiply, [rows, weight], grad),
        _differentiate(case, loop, [rows, weight], grad),
    )


def _differentiate(
    case: KernelCase,
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    grad: Tensor,
) -> Call:
    is_train = case.phase == "train"
    leaves = [x.detach().clone().requires_grad_(is_train) for x in inputs]

    def call() -> Results:
        output = function(*leaves)
        if not is_train:
            return [output]

        return [output, *torch.autograd.grad(output, leaves, grad)]

    return call
