"""Tests of `moxe_plugin.nn.triton.row_products`."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import grad
from torch.nn.functional import silu
from torch.testing import assert_close

pytest.importorskip("triton")

from moxe_plugin.nn.triton.row_products import (
    silu_product_backward,
    silu_product_forward,
)


# Blocks have 32 rows and 64 columns.
@pytest.mark.parametrize(("num_rows", "width"), [(33, 66), (1, 1), (64, 64), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_gradient_are_those_of_torch(
    num_rows: int, width: int, dtype: torch.dtype, device: torch.device
) -> None:
    # A part of wider rows
    flat = torch.randn(num_rows, 2 * width + 2, device=device, dtype=dtype)
    projected = flat[:, : 2 * width]
    wide = projected.double().requires_grad_()

    actual = silu_product_forward(projected)
    gate, value = wide.chunk(2, dim=-1)
    expected = silu(gate) * value
    upstream = torch.randn_like(actual)

    assert_close(actual, expected.to(dtype))
    assert_close(
        silu_product_backward(upstream, projected),
        grad(expected, wide, upstream.double())[0].to(dtype),
    )
