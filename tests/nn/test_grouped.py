"""Tests of `moxe_plugin.nn.grouped`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, bfloat16, float32, float64
from torch.autograd import grad
from torch.testing import assert_close

from moxe_plugin.nn.grouped import (
    grouped_head_product,
    grouped_head_products,
    grouped_product,
    spread,
)
from moxe_plugin.nn.products import matmul, runs_native

COUNTS = [
    pytest.param([3, 0, 5, 1], id="idle"),
    pytest.param([0, 0, 9, 0], id="one-busy"),
    pytest.param([0, 0, 0, 0], id="no-row"),
]


def make_rows(counts: list[int], width: int, device: torch.device) -> Tensor:
    return torch.randn(
        sum(counts), width, device=device, dtype=float64, requires_grad=True
    )


def make_weight(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(4, *shape, device=device, dtype=float64, requires_grad=True)


def assert_same(actual: Tensor, expected: Tensor, rows: Tensor, weight: Tensor) -> None:
    upstream = torch.randn_like(expected)
    leaves = [rows, weight]

    assert_close(actual, expected, rtol=0, atol=1e-10)
    assert_close(
        grad((actual * upstream).sum(), leaves),
        grad((expected * upstream).sum(), leaves),
        rtol=0,
        atol=1e-10,
    )


@pytest.mark.parametrize("counts", COUNTS)
def test_each_row_meets_the_weight_of_its_expert(
    counts: list[int], device: torch.device
) -> None:
    rows, weight = make_rows(counts, 6, device), make_weight(6, 5, device=device)

    expert_ids = torch.arange(4).repeat_interleave(torch.tensor(counts)).to(device)
    expected = torch.einsum("ci,cio->co", rows, weight[expert_ids])

    assert_same(grouped_product(rows, weight, counts), expected, rows, weight)


@pytest.mark.parametrize("counts", COUNTS)
def test_each_group_of_channels_meets_its_own_weight(
    counts: list[int], device: torch.device
) -> None:
    rows, weight = make_rows(counts, 6, device), make_weight(3, 2, 5, device=device)

    expert_ids = torch.arange(4).repeat_interleave(torch.tensor(counts)).to(device)
    expected = torch.einsum(
        "cgi,cgio->cgo", rows.unflatten(1, (3, 2)), weight[expert_ids]
    ).flatten(1)

    assert_same(grouped_head_product(rows, weight, counts), expected, rows, weight)


@pytest.mark.parametrize("dtype", [float64, float32], ids=str)
@pytest.mark.parametrize("counts", COUNTS)
def test_products_with_parts_of_one_weight_are_those_with_each(
    counts: list[int], dtype: torch.dtype, device: torch.device
) -> None:
    weight = make_weight(3, 2, 2, 32, device=device).detach().to(dtype)
    rows = [make_rows(counts, 6, device).detach().to(dtype) for _ in range(2)]
    leaves = [x.requires_grad_() for x in (weight, *rows)]

    actual = grouped_head_products(rows, weight, counts)
    expected = [
        grouped_head_product(x, part, counts)
        for x, part in zip(rows, weight.unbind(-2), strict=True)
    ]

    assert_close(actual, expected, rtol=0, atol=0)
    upstream = [torch.randn_like(x) for x in expected]
    assert_close(
        torch.autograd.grad(actual, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        rtol=0,
        atol=0,
    )


def test_a_part_that_needs_no_gradient_gets_none(device: torch.device) -> None:
    counts = [3, 0, 5, 1]
    weight = make_weight(3, 2, 2, 5, device=device).detach()
    fixed, rows = make_rows(counts, 6, device).detach(), make_rows(counts, 6, device)

    first, second = grouped_head_products([fixed, rows], weight, counts)
    (first.sum() + second.sum()).backward()

    alone = grad(grouped_head_product(rows, weight[..., 1, :], counts).sum(), rows)
    assert rows.grad is not None
    assert_close(rows.grad, *alone)
    assert weight.grad is None


@pytest.mark.parametrize("counts", COUNTS)
def test_each_row_gets_the_vector_of_its_expert(
    counts: list[int], device: torch.device
) -> None:
    vectors = make_weight(6, device=device)
    rows = make_rows(counts, 6, device)

    expert_ids = torch.arange(4).repeat_interleave(torch.tensor(counts)).to(device)

    assert_same(
        rows * spread(vectors, counts), rows * vectors[expert_ids], rows, vectors
    )


def test_product_computes_in_the_type_of_autocast(device: torch.device) -> None:
    counts = [3, 0, 5, 1]
    rows = make_rows(counts, 6, device).detach().float().requires_grad_()
    weight = make_weight(6, 5, device=device).detach().float().requires_grad_()

    with torch.autocast(device.type, bfloat16):
        product = grouped_product(rows, weight, counts)
        parts = [
            matmul(x, w)
            for x, w in zip(rows.split(counts), weight.unbind(), strict=True)
        ]
        is_native = runs_native(rows, weight)

    assert product.dtype == (float32 if is_native else bfloat16)
    # Both round the same sums, perhaps in another order.
    assert_close(product, torch.cat(parts))

    actual = grad(product.float().square().sum(), [rows, weight])
    expected = grad(torch.cat(parts).float().square().sum(), [rows, weight])
    # As wide as bfloat16, in which the gradients are computed
    assert_close(actual, expected, rtol=2e-2, atol=2e-2)


def test_float64_stays_float64_under_autocast(device: torch.device) -> None:
    rows = make_rows([2, 0, 0, 1], 6, device)
    weight = make_weight(6, 5, device=device)

    with torch.autocast(device.type, bfloat16):
        assert grouped_product(rows, weight, [2, 0, 0, 1]).dtype == float64
