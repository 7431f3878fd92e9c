"""Tests of `moxe_plugin.nn.expert_products`, on any device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, bfloat16, float64
from torch.testing import assert_close

from moxe_plugin.nn.expert_products import (
    expert_outer_products,
    expert_products,
    head_outer_products,
    head_products,
)

COUNTS = [
    pytest.param([3, 0, 5, 1], id="idle"),
    pytest.param([0, 0, 0], id="no_row"),
    pytest.param([4], id="no_bank"),
    pytest.param([2, 0, 1, 0, 0, 3, 1, 1, 2], id="many"),
]


def draw(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=float64)


def expert_of_row(counts: list[int], device: torch.device) -> Tensor:
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device)


@pytest.mark.parametrize("counts", COUNTS)
def test_each_row_meets_the_weight_of_its_expert_with_gradients(
    counts: list[int], device: torch.device
) -> None:
    # A half of a wider tensor
    rows = draw(sum(counts), 12, device=device)[:, :6].requires_grad_()
    weight = draw(len(counts), 6, 5, device=device).requires_grad_()
    direction = draw(sum(counts), 10, device=device)[:, 5:]

    with torch.no_grad():
        actual = expert_products(rows, weight, counts)
        of_rows = expert_products(direction, weight.mT, counts)
        of_weight = expert_outer_products(rows, direction, counts)

    gathered = weight[expert_of_row(counts, device)]
    expected = torch.einsum("ci,cio->co", rows, gathered)

    assert_close(actual, expected)
    assert_close(
        (of_rows, of_weight),
        torch.autograd.grad(expected, [rows, weight], direction),
    )


@pytest.mark.parametrize("counts", COUNTS)
def test_gradients_of_a_plain_sum_are_right(
    counts: list[int], device: torch.device
) -> None:
    grad = torch.ones((), device=device, dtype=float64).expand(sum(counts), 5)
    rows = draw(sum(counts), 6, device=device)
    weight = draw(len(counts), 6, 5, device=device)

    assert_close(
        expert_products(grad, weight.mT, counts),
        expert_products(grad.contiguous(), weight.mT.contiguous(), counts),
    )
    parts = zip(rows.split(counts), grad.split(counts), strict=True)
    assert_close(
        expert_outer_products(rows, grad, counts),
        torch.stack([x.T @ y for x, y in parts]),
    )


@pytest.mark.parametrize("counts", COUNTS)
def test_each_group_of_channels_meets_its_own_weight(
    counts: list[int], device: torch.device
) -> None:
    rows = draw(sum(counts), 14, device=device)[:, 2:8]
    others = draw(sum(counts), 15, device=device)
    # One of two parts of a parameter
    weight = draw(len(counts), 3, 2, 2, 5, device=device)[..., 1, :]
    sums = torch.full_like(weight.new_empty(len(counts), 3, 2, 2, 5), torch.nan)
    experts = expert_of_row(counts, device)
    grouped = rows.unflatten(1, (3, 2))

    head_outer_products(rows, others, sums[..., 0, :], counts)

    expected = torch.einsum("cgi,cgio->cgo", grouped, weight[experts]).flatten(1)
    assert_close(head_products(rows, weight, counts), expected)
    outer = torch.einsum("cgi,cgo->cgio", grouped, others.unflatten(1, (3, 5)))
    expected = torch.zeros_like(sums[..., 0, :]).index_add(0, experts, outer)
    assert_close(sums[..., 0, :].contiguous(), expected)
    assert sums[..., 1, :].isnan().all()


def test_many_experts_may_be_multiplied_at_once(device: torch.device) -> None:
    counts = [2, 0, 1, 0, 0, 3, 1, 1, 8]
    rows = draw(sum(counts), 16, device=device).to(bfloat16)
    weight = draw(len(counts), 16, 24, device=device).to(bfloat16)
    ends = torch.tensor(counts, device=device).cumsum(0).int()

    actual = expert_products(rows, weight, counts, ends)

    # Both round the same sums.
    assert_close(actual, expert_products(rows, weight, counts))
