"""Tests of `moxe_plugin.nn.modulation`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, tensor
from torch.testing import assert_close

from moxe_plugin.nn.modulation import (
    MaskedModulation,
    Modulation,
    ProportionalModulation,
    standard_modulation,
)

DIFFICULTY = tensor([0.1, 0.6, 0.75, 0.9], dtype=torch.float64)


@pytest.mark.parametrize(
    ("modulation", "expected"),
    [
        pytest.param(standard_modulation, [0.1, 0.6, 0.75, 0.9], id="standard"),
        pytest.param(MaskedModulation(0.6), [0.0, 0.0, 0.75, 0.9], id="masked"),
        pytest.param(
            ProportionalModulation(0.6), [0.0, 0.0, 0.15, 0.3], id="proportional"
        ),
    ],
)
def test_strengths_are_those_worked_out_by_hand(
    modulation: Modulation, expected: list[float], device: torch.device
) -> None:
    strengths: Tensor = modulation(DIFFICULTY.to(device))

    assert_close(strengths, tensor(expected, dtype=torch.float64, device=device))


@pytest.mark.parametrize(
    ("modulation", "expected"),
    [
        pytest.param(standard_modulation, [1.0, 1.0, 1.0, 1.0], id="standard"),
        pytest.param(MaskedModulation(0.7), [0.0, 0.0, 1.0, 1.0], id="masked"),
        pytest.param(
            ProportionalModulation(0.7), [0.0, 0.0, 1.0, 1.0], id="proportional"
        ),
    ],
)
def test_gradient_flows_only_where_the_difficulty_acts(
    modulation: Modulation, expected: list[float], device: torch.device
) -> None:
    difficulty = DIFFICULTY.to(device, copy=True).requires_grad_()

    torch.autograd.backward(modulation(difficulty).sum())

    assert difficulty.grad is not None
    assert difficulty.grad.tolist() == expected
