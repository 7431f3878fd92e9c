"""Tests of `moxe_plugin.nn.layers`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, float64, tensor
from torch.nn import Module
from torch.nn.functional import conv1d
from torch.testing import assert_close

from moxe_plugin.nn.feed_forward import GatedFeedForward
from moxe_plugin.nn.layers import (
    CausalConv,
    ScaleNorm,
    down_init_std,
    round_up_to_64,
    small_init_std,
)

E, N, S, M, K = 2, 3, 7, 6, 4


def randn(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=float64)


def randomised(module: Module, device: torch.device) -> Module:
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)

    return module.to(device, float64)


def test_norm_subtracts_the_mean_and_divides_by_the_deviation() -> None:
    norm = ScaleNorm(2).double()
    with torch.no_grad():
        norm.weight.copy_(tensor([1.0, 3.0]))

    # mean 4, biased variance 9
    out = norm(tensor([[[7.0, 1.0]]], dtype=float64))

    scale = 3 / math.sqrt(9 + 1e-5)
    assert_close(out, tensor([[[scale, -3 * scale]]], dtype=float64))


@pytest.mark.parametrize("num_experts", [None, E], ids=["single", "stacked"])
def test_norm_per_head_normalises_each_slice(
    num_experts: int | None, device: torch.device
) -> None:
    norm = randomised(ScaleNorm(M, num_heads=3, num_experts=num_experts), device)
    lead = () if num_experts is None else (num_experts,)
    seqs = randn(device, *lead, N, S, M)

    slices = []
    for x in seqs.split(2, dim=-1):
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).square().mean(-1, keepdim=True)
        slices.append((x - mean) / (variance + 1e-5).sqrt())
    weight = next(norm.parameters())

    expected = torch.cat(slices, dim=-1) * weight.view(*lead, 1, 1, M)
    assert_close(norm(seqs), expected)


def test_convolution_is_that_of_torch_with_padding_on_the_left(
    device: torch.device,
) -> None:
    conv = randomised(CausalConv(M, kernel_size=K), device)
    seqs, window = randn(device, N, S, M), randn(device, N, K - 1, M)
    weight, bias = conv.parameters()

    out, _ = conv(seqs, window)

    inputs = torch.cat([window, seqs], dim=1).mT
    assert_close(out, conv1d(inputs, weight.T.unsqueeze(1), bias, groups=M).mT)


def test_convolution_window_holds_the_last_valid_inputs(device: torch.device) -> None:
    conv = randomised(CausalConv(1, kernel_size=K), device)
    seqs = torch.arange(1.0, 6.0, device=device).repeat(4, 1).unsqueeze(-1)
    window = tensor([-3.0, -2.0, -1.0], device=device).repeat(4, 1).unsqueeze(-1)

    _, after = conv(seqs, window, tensor([0, 1, 3, 5], device=device))
    assert after.squeeze(-1).tolist() == [
        [-3, -2, -1],
        [-2, -1, 1],
        [1, 2, 3],
        [3, 4, 5],
    ]

    _, after = conv(seqs, window)
    assert after[0].squeeze(-1).tolist() == [3, 4, 5]


@pytest.mark.parametrize("num_experts", [None, E], ids=["single", "stacked"])
def test_feed_forward_gates_with_silu(
    num_experts: int | None, device: torch.device
) -> None:
    ffn = GatedFeedForward(M, 5, up_std=1.0, down_std=1.0, num_experts=num_experts)
    ffn.to(device, float64)
    lead = () if num_experts is None else (num_experts,)
    seqs = randn(device, *lead, N, S, M)
    equation = "nsi,io->nso" if num_experts is None else "ensi,eio->enso"

    gate = torch.einsum(equation, seqs, ffn.up_proj[..., :5])
    value = torch.einsum(equation, seqs, ffn.up_proj[..., 5:])
    hidden = gate * gate.sigmoid() * value

    assert_close(ffn(seqs), torch.einsum(equation, hidden, ffn.down_proj))


def test_initial_deviations_are_the_documented_ones() -> None:
    ffn = GatedFeedForward(64, 512, up_std=0.5, down_std=0.25)
    conv = CausalConv(4096, kernel_size=K)

    # 2 % is five standard errors of the smallest sample.
    assert ffn.up_proj.std().item() == pytest.approx(0.5, rel=0.02)
    assert ffn.down_proj.std().item() == pytest.approx(0.25, rel=0.02)
    assert conv.weight.std().item() == pytest.approx(0.5, rel=0.03)
    assert not conv.bias.any()
    assert small_init_std(640) == pytest.approx(math.sqrt(2 / 3200))
    assert down_init_std(640, 30) == pytest.approx(2 / (30 * math.sqrt(640)))


def test_widths_are_rounded_up_to_64() -> None:
    assert [round_up_to_64(1.7 * dim) for dim in (16, 640, 1024)] == [64, 1088, 1792]
    assert round_up_to_64(2.0 * 640) == 1280
