"""Each kernel and its reference in torch, ready to be called on the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from moxe_plugin.nn import mlstm_cell, slstm_cell
from moxe_plugin.nn.padding import EMPTY
from moxe_plugin.nn.ragged import RaggedRows, ragged_rows
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


def why_not_run(case: KernelCase, dtype: torch.dtype) -> str | None:
    """Look for a kernel that does not take a type.

    :param case: The case.
    :param dtype: The type of the kernel's inputs.

    :returns: Why it does not run, or ``None``.
    """
    from moxe_plugin.nn.triton.slstm_rows import supports

    if case.kernel != "slstm" or supports(case.dim, dtype):
        return None

    return f"R, of {dtype} and heads {case.dim} wide, does not stay on chip"


def prepare_kernel_calls(
    case: KernelCase, dtype: torch.dtype, device: torch.device, seed: int
) -> KernelCalls:
    """Draw inputs and make both calls.

    The references compute as our layers do in torch: the mLSTM in chunks of the best
    size, which is its parallel form for short sequences, and the sLSTM in float32 with
    the batch last. How inputs get there is not part of a call.

    :param case: The case.
    :param dtype: The type of the kernel's inputs.
    :param device: Where they are.
    :param seed: Seeds the inputs.

    :returns: The calls.
    """
    draw = _Draw(torch.Generator(device).manual_seed(seed), dtype, device)
    prepare = {"mlstm": _prepare_mlstm, "slstm": _prepare_slstm, "scan": _prepare_scan}

    return prepare[case.kernel](case, draw)


class _Draw(NamedTuple):
    generator: torch.Generator
    dtype: torch.dtype
    device: torch.device

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device)

        return (values * std).to(self.dtype)


def _prepare_mlstm(case: KernelCase, draw: _Draw) -> KernelCalls:
    from moxe_plugin.nn.triton.mlstm_rows import mlstm_rows

    shape = (case.num_experts, case.num_rows, case.num_heads, case.length)
    qkv = [draw.normal(*shape, case.dim) for _ in range(3)]
    gates = [draw.normal(*shape).float() for _ in range(2)]
    gates[1] += _FORGET_BIAS
    grad = draw.normal(*shape, case.dim)
    rows = _lay_out(case, draw.device)
    chunk_size = mlstm_cell.best_chunk_size(case.length, case.dim)

    def run(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
        return mlstm_rows(q, k, v, gates, rows, case.num_heads)

    def run_in_torch(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor) -> Tensor:
        return mlstm_cell.mlstm_chunkwise(
            *(q, k, v, i, f), chunk_size=chunk_size, return_memory=False
        )[0]

    def align(results: Results) -> Results:
        vectors = [_vectors_to_rows(x) for x in results[:4]]
        if len(results) == 1:
            return vectors

        return [*vectors, _gates_to_rows(results[4:])]

    in_rows = [*map(_vectors_to_rows, qkv), _gates_to_rows(gates)]

    return KernelCalls(
        _differentiate(case, run, in_rows, _vectors_to_rows(grad)),
        _differentiate(case, run_in_torch, [*qkv, *gates], grad),
        align,
    )


def _vectors_to_rows(x: Tensor) -> Tensor:
    # (E,N,H,S,D) -> (C,H*D)
    return x.transpose(2, 3).flatten(3).flatten(0, 2)


def _gates_to_rows(gates: Sequence[Tensor]) -> Tensor:
    # Two of (E,N,H,S) -> (C,2H)
    return torch.cat(list(gates), dim=2).mT.flatten(0, 2)


def _prepare_slstm(case: KernelCase, draw: _Draw) -> KernelCalls:
    from moxe_plugin.nn.triton.slstm_rows import slstm_rows

    cells = _draw_slstm(case, draw)
    rows = _lay_out(case, draw.device)

    def run(inputs: Tensor, weight: Tensor) -> Tensor:
        return slstm_rows(inputs, cells.bias, weight, rows)

    def to_rows(halves: Sequence[Tensor]) -> Tensor:
        # Two of (E,H,N,S,2D) -> (2,C,H*2D)
        return torch.stack(
            [x.permute(0, 2, 3, 1, 4).flatten(3).flatten(0, 2) for x in halves]
        )

    def align(results: Results) -> Results:
        output, *grads = results
        output = output.flatten(3).flatten(0, 2)
        if not grads:
            return [output]

        return [output, to_rows(_halves_of(case, grads[0])), _stack_of(case, grads[1])]

    return KernelCalls(
        _differentiate(
            *(case, run, [to_rows(cells.halves), cells.weight]),
            cells.grad.flatten(3).flatten(0, 2),
        ),
        _prepare_loop(case, cells),
        align,
    )


def _prepare_scan(case: KernelCase, draw: _Draw) -> KernelCalls:
    from moxe_plugin.nn.triton.slstm_scan import slstm_scan

    cells = _draw_slstm(case, draw)
    # (E,H,N,S,2D), as a block's products lay them out: by row and head
    halves = [x.movedim(1, 3).contiguous().movedim(3, 1) for x in cells.halves]

    def run(gates_if: Tensor, gates_zo: Tensor, weight: Tensor) -> Tensor:
        inputs = SLSTMScanInputs(gates_if, gates_zo, cells.bias, weight, *cells.memory)

        return slstm_scan(inputs, None)[0]

    def align(results: Results) -> Results:
        output, *grads = results
        if not grads:
            return results

        return [output, *_halves_of(case, grads[0]), _stack_of(case, grads[1])]

    return KernelCalls(
        _differentiate(case, run, [*halves, cells.weight], cells.grad),
        _prepare_loop(case, cells),
        align,
    )


class _SLSTM(NamedTuple):
    halves: list[Tensor]
    """Gates i and f, and z and o. *Shape:* ``(E,H,N,S,2D)`` each."""

    bias: Tensor
    """0. *Shape:* ``(E,H,4,D)``."""

    weight: Tensor
    """R. *Shape:* ``(E,H,D,4,D)``."""

    memory: list[Tensor]
    """An empty one. *Shape:* ``(E,N,H,D)`` each."""

    grad: Tensor
    """Of the outputs. *Shape:* ``(E,N,S,H,D)``."""


def _draw_slstm(case: KernelCase, draw: _Draw) -> _SLSTM:
    e, n, s, h, d = (
        *(case.num_experts, case.num_rows, case.length),
        *(case.num_heads, case.dim),
    )
    halves = [draw.normal(e, h, n, s, 2 * d) for _ in range(2)]
    weight = draw.normal(e, h, d, 4, d, std=d**-0.5)
    bias = torch.zeros(e, h, 4, d, device=draw.device)
    memory = [torch.zeros(e, n, h, d, device=draw.device) for _ in range(3)]
    memory[1] += EMPTY

    return _SLSTM(halves, bias, weight, memory, draw.normal(e, n, s, h, d))


def _prepare_loop(case: KernelCase, cells: _SLSTM) -> Call:
    # (E,H,N,S,2D) twice -> (S,E*H,4,D,N)
    gates = torch.cat([x.unflatten(-1, (2, case.dim)) for x in cells.halves], dim=-2)
    gates = gates.float().flatten(0, 1).permute(2, 0, 3, 4, 1).contiguous()
    memory = slstm_cell.SLSTMMemory(
        # (E,N,H,D) -> (E*H,D,N)
        *(x.permute(0, 2, 3, 1).flatten(0, 1).contiguous() for x in cells.memory)
    )

    def loop(gates: Tensor, weight: Tensor) -> Tensor:
        outputs, *_ = slstm_cell.slstm_sequence(gates, weight, memory)

        # (S,E*H,D,N) -> (E,N,S,H,D), a view
        return _stack_of(case, outputs, 1).permute(1, 4, 0, 2, 3)

    weight = cells.weight.float().flatten(0, 1)

    return _differentiate(case, loop, [gates, weight], cells.grad.float())


def _halves_of(case: KernelCase, gates: Tensor) -> tuple[Tensor, ...]:
    # (S,E*H,4,D,N) -> two of (E,H,N,S,2D)
    gates = gates.permute(1, 4, 0, 2, 3).flatten(-2)

    return _stack_of(case, gates).chunk(2, dim=-1)


def _stack_of(case: KernelCase, x: Tensor, dim: int = 0) -> Tensor:
    return torch.unflatten(x, dim, (case.num_experts, case.num_heads))


def _lay_out(case: KernelCase, device: torch.device) -> RaggedRows:
    return ragged_rows([[case.length] * case.num_rows] * case.num_experts, device)


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
