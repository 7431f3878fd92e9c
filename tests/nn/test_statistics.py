"""Tests of `moxe_plugin.nn.statistics`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import float64, tensor

from moxe_plugin.nn.routing import Routing, stack_routings
from moxe_plugin.nn.statistics import (
    count_expert_loads,
    router_stat_names,
    router_stats,
)


def make_routing(device: torch.device, *, has_difficulty: bool) -> Routing:
    uniform, halves = [0.25] * 4, [0.5, 0.5, 0.0, 0.0]

    probs = tensor([uniform, halves, uniform], dtype=float64, device=device)
    indices = tensor([[0, 2], [0, 1], [3, 1]], device=device)
    difficulty = tensor([0.2, 0.6, 0.9], dtype=float64, device=device)

    return Routing(
        router_logits=probs,
        biased_logits=probs,
        router_probs=probs,
        unbiased_probs=probs.requires_grad_(),
        difficulty=difficulty if has_difficulty else None,
        expert_indices=indices,
        expert_weights=torch.full((3, 2), 0.5, dtype=float64, device=device),
    )


def test_statistics_are_those_worked_out_by_hand(device: torch.device) -> None:
    stats = router_stats(make_routing(device, has_difficulty=True), 2)

    assert {name: value.item() for name, value in stats.items()} == pytest.approx(
        {
            "mlstm_share": 4 / 6,
            "slstm_share": 2 / 6,
            "router_entropy": 2.5 / 3,
            "difficulty": 1.7 / 3,
            "busiest_expert_share": 2 / 6,
            "idle_experts": 0.0,
        }
    )


def test_empty_places_are_no_assignments(device: torch.device) -> None:
    routing = make_routing(device, has_difficulty=False)._replace(
        expert_indices=tensor([[0, 2, 1], [1, -1, -1], [3, 0, -1]], device=device)
    )

    stats = router_stats(routing, 1, varies_top_k=True)

    assert {name: value.item() for name, value in stats.items()} == pytest.approx(
        {
            "mlstm_share": 2 / 6,
            "slstm_share": 4 / 6,
            "router_entropy": 2.5 / 3,
            "busiest_expert_share": 2 / 6,
            "idle_experts": 0.0,
            "experts_per_token": 2.0,
        }
    )

    mask = tensor([False, True, True], device=device)

    assert count_expert_loads(routing).tolist() == [2, 2, 1, 1]
    assert count_expert_loads(routing, mask).tolist() == [1, 1, 0, 1]


def test_masked_tokens_do_not_count(device: torch.device) -> None:
    routing = make_routing(device, has_difficulty=True)

    stats = router_stats(routing, 3, tensor([True, True, False], device=device))

    assert {name: value.item() for name, value in stats.items()} == pytest.approx(
        {
            "mlstm_share": 1.0,
            "slstm_share": 0.0,
            "router_entropy": 0.75,
            "difficulty": 0.4,
            "busiest_expert_share": 0.5,
            "idle_experts": 1.0,
        }
    )


def test_a_batch_without_a_token_gives_finite_statistics(device: torch.device) -> None:
    routing = make_routing(device, has_difficulty=True)

    stats = router_stats(routing, 2, torch.zeros(3, dtype=torch.bool, device=device))

    assert all(math.isfinite(value.item()) for value in stats.values())


@pytest.mark.parametrize("varies_top_k", [True, False])
@pytest.mark.parametrize("has_difficulty", [True, False])
def test_names_are_known_beforehand(
    has_difficulty: bool, varies_top_k: bool, device: torch.device
) -> None:
    stats = router_stats(
        make_routing(device, has_difficulty=has_difficulty),
        2,
        varies_top_k=varies_top_k,
    )

    assert tuple(stats) == router_stat_names(
        has_difficulty=has_difficulty, varies_top_k=varies_top_k
    )
    assert not any(value.requires_grad for value in stats.values())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("has_difficulty", [True, False])
def test_statistics_of_layers_are_those_of_each(
    has_difficulty: bool, masked: bool, device: torch.device
) -> None:
    routing = make_routing(device, has_difficulty=has_difficulty)
    layers = [routing, routing._replace(expert_indices=routing.expert_indices % 2)]
    mask = tensor([True, False, True], device=device) if masked else None

    stacked = stack_routings(layers)
    stats = router_stats(stacked, 1, mask, varies_top_k=True)
    loads = count_expert_loads(stacked, mask)

    for i, layer in enumerate(layers):
        expected = router_stats(layer, 1, mask, varies_top_k=True)

        assert {name: values[i].item() for name, values in stats.items()} == {
            name: pytest.approx(value.item()) for name, value in expected.items()
        }
        assert loads[i].tolist() == count_expert_loads(layer, mask).tolist()
