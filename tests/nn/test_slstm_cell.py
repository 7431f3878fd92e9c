"""Tests of `moxe_plugin.nn.slstm_cell`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, float64
from torch.autograd import grad, gradcheck
from torch.testing import assert_close

from moxe_plugin.nn.padding import EMPTY
from moxe_plugin.nn.slstm_cell import SLSTMMemory, slstm_sequence, slstm_step

S, B, D, N = 7, 2, 3, 5


def make_inputs(device: torch.device) -> tuple[Tensor, Tensor, SLSTMMemory]:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=float64).requires_grad_()

    memory = SLSTMMemory(randn(B, D, N), randn(B, D, N), randn(B, D, N))

    return randn(S, B, 4, D, N), randn(B, D, 4, D), memory


def empty_memory(device: torch.device) -> SLSTMMemory:
    zeros = torch.zeros(B, D, N, device=device, dtype=float64)

    return SLSTMMemory(zeros, zeros + EMPTY, zeros)


def run_steps(
    gate_inputs: Tensor, weight: Tensor, memory: SLSTMMemory
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = []

    for gate_input in gate_inputs:
        y, memory = slstm_step(gate_input, weight, memory)
        outputs.append(y)

    return torch.stack(outputs), memory.c, memory.log_n


def test_step_is_the_unstabilised_recurrence(device: torch.device) -> None:
    gate_inputs, weight, _ = make_inputs(device)
    outputs, final_c, final_log_n = run_steps(gate_inputs, weight, empty_memory(device))

    c, n, y = torch.zeros(3, B, D, N, device=device, dtype=float64)
    for t in range(S):
        recurrent = [weight[:, :, gate].mT @ y for gate in range(4)]
        i, f, z, o = (gate_inputs[t, :, gate] + recurrent[gate] for gate in range(4))
        c = f.sigmoid() * c + i.exp() * z.tanh()
        n = f.sigmoid() * n + i.exp()
        y = o.sigmoid() * c / n
        assert_close(outputs[t], y)

    assert_close(final_c, c / n)
    assert_close(final_log_n, n.log())


@pytest.mark.parametrize("with_memory", [False, True], ids=["empty", "with_memory"])
def test_sequence_agrees_with_steps_in_values_and_gradients(
    with_memory: bool, device: torch.device
) -> None:
    gate_inputs, weight, memory = make_inputs(device)
    leaves = [gate_inputs, weight, *(memory if with_memory else ())]
    if not with_memory:
        memory = empty_memory(device)

    expected = run_steps(gate_inputs, weight, memory)
    actual = slstm_sequence(gate_inputs, weight, memory)
    assert_close(actual, expected)

    directions = [torch.randn_like(x) for x in expected]
    assert_close(
        grad(actual, leaves, directions),
        grad(expected, leaves, directions),
        rtol=1e-9,
        atol=1e-12,
    )


def test_two_chunks_have_the_gradients_of_one_sequence(device: torch.device) -> None:
    gate_inputs, weight, memory = make_inputs(device)
    leaves = [gate_inputs, weight, *memory]

    whole = slstm_sequence(gate_inputs, weight, memory)

    first, c, log_n = slstm_sequence(gate_inputs[:3], weight, memory)
    second, c, log_n = slstm_sequence(
        gate_inputs[3:], weight, SLSTMMemory(c, log_n, first[-1])
    )
    chunks = (torch.cat([first, second]), c, log_n)
    assert_close(chunks, whole)

    directions = [torch.randn_like(x) for x in whole]
    assert_close(grad(chunks, leaves, directions), grad(whole, leaves, directions))


def test_backward_is_the_derivative_of_forward(device: torch.device) -> None:
    gate_inputs, weight, memory = make_inputs(device)

    def forward(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return slstm_sequence(inputs[0], inputs[1], SLSTMMemory(*inputs[2:]))

    assert gradcheck(forward, (gate_inputs[:4], weight, *memory))


@pytest.mark.parametrize("input_preact", [-80.0, 80.0, -1e4, 1e4])
@pytest.mark.parametrize("forget_preact", [-80.0, 80.0, -1e4, 1e4])
def test_extreme_gates_give_finite_values_and_gradients(
    input_preact: float, forget_preact: float, device: torch.device
) -> None:
    gate_inputs, weight, _ = make_inputs(device)
    with torch.no_grad():
        gate_inputs[::2, :, 0] = input_preact
        gate_inputs[1::3, :, 1] = forget_preact
        gate_inputs[:, :, 2:, ::2] *= 80
    leaves = [gate_inputs.detach().float(), weight.detach().float()]
    leaves = [x.requires_grad_() for x in leaves]
    memory = SLSTMMemory(*(x.float() for x in empty_memory(device)))

    results = slstm_sequence(leaves[0], leaves[1], memory)

    for x in (*results, *grad(results, leaves, [torch.ones_like(r) for r in results])):
        assert x.isfinite().all()
