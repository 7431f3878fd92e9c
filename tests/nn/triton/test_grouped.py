"""Tests of `moxe_plugin.nn.triton.grouped`, against a loop over experts."""

from __future__ import annotations

import pytest
import torch
from torch import float16, float32
from torch.testing import assert_close

pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", [float32, float16], ids=str)
@pytest.mark.parametrize(
    "counts", [[3, 0, 35], [0, 0], [1]], ids=["idle_expert", "all_idle", "one_row"]
)
def test_kernels_are_the_loop_over_experts_with_gradients(
    counts: list[int], dtype: torch.dtype, device: torch.device
) -> None:
    from moxe_plugin.nn.triton.grouped import grouped_product

    num_in, num_out = 37, 45
    rows = torch.randn(sum(counts), num_in, device=device).to(dtype)
    weight = torch.randn(len(counts), num_in, num_out, device=device).to(dtype)
    leaves = [rows.requires_grad_(), weight.requires_grad_()]
    direction = torch.randn(sum(counts), num_out, device=device).to(dtype)

    parts = zip(rows.float().split(counts), weight.float(), strict=True)
    expected = torch.cat([x @ w for x, w in parts]).to(dtype)
    actual = grouped_product(rows, weight, counts)

    # Sums of about 40 products of size 1; float16 is rounded once, at the end.
    tolerance = 1e-5 if dtype == float32 else 2e-3
    for x, y in zip(
        [actual, *torch.autograd.grad(actual, leaves, direction)],
        [expected, *torch.autograd.grad(expected, leaves, direction)],
        strict=True,
    ):
        assert_close(x, y, rtol=tolerance, atol=tolerance * 4)


def test_counts_that_do_not_fit_are_named(device: torch.device) -> None:
    from moxe_plugin.nn.triton.grouped import grouped_product

    rows, weight = torch.zeros(3, 2, device=device), torch.zeros(2, 2, 2, device=device)

    with pytest.raises(ValueError, match=r"`counts` must have 2 .* sum to 3"):
        grouped_product(rows, weight, [1, 1])
