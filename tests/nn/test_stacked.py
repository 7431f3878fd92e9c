"""Tests of `moxe_plugin.nn.stacked`."""

from __future__ import annotations

import pytest
import torch
from torch import float64
from torch.testing import assert_close

from moxe_plugin.nn.stacked import per_channel, project, project_head_wise

E, N, S, M = 2, 3, 5, 6


def lead_of(num_experts: int | None) -> tuple[int, ...]:
    return () if num_experts is None else (num_experts,)


@pytest.mark.parametrize("num_experts", [None, E], ids=["single", "stacked"])
def test_projection_multiplies_every_position(
    num_experts: int | None, device: torch.device
) -> None:
    lead = lead_of(num_experts)
    seqs = torch.randn(*lead, N, S, M, device=device, dtype=float64)
    weight = torch.randn(*lead, M, 4, device=device, dtype=float64)

    expected = (seqs.unsqueeze(-1) * weight[..., None, None, :, :]).sum(-2)
    assert_close(project(seqs, weight), expected)


@pytest.mark.parametrize("num_experts", [None, E], ids=["single", "stacked"])
def test_head_wise_projection_multiplies_each_slice(
    num_experts: int | None, device: torch.device
) -> None:
    lead = lead_of(num_experts)
    seqs = torch.randn(*lead, N, S, M, device=device, dtype=float64)
    weight = torch.randn(*lead, 3, 2, 2, device=device, dtype=float64)

    expected = [
        project(piece, w)
        for piece, w in zip(seqs.split(2, -1), weight.unbind(-3), strict=True)
    ]
    assert_close(project_head_wise(seqs, weight), torch.cat(expected, dim=-1))


def test_channels_of_each_expert_meet_its_own_vector(device: torch.device) -> None:
    vector = torch.randn(E, M, device=device)
    seqs = torch.randn(E, N, S, M, device=device)

    for e in range(E):
        expected = seqs[e] * per_channel(vector[e], seqs[e])
        assert_close((seqs * per_channel(vector, seqs))[e], expected)
