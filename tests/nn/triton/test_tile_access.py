"""Tests of `moxe_plugin.nn.triton.tile_access`, as Triton interprets it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, bfloat16, float16, float32

pytest.importorskip("triton")

import triton
import triton.language as tl

from moxe_plugin.nn.triton.tile_access import (
    fetch_ahead,
    load_four_here,
    load_here,
    store_four_here,
    store_here,
)
from moxe_plugin.nn.triton.tile_products import is_interpreted


@triton.jit  # type: ignore[untyped-decorator]  # Triton has no annotations
def copy_kernel(source, target, size, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]  # as above
    places = tl.arange(0, BLOCK)
    is_in = places < size
    fetch_ahead(source + places, is_in, INTERPRETED)
    x = load_here(source + places, is_in, INTERPRETED)
    # What is not loaded is 0, and stored where the mask ends later.
    store_here(target + places, x + 1.0, places < size + 1, INTERPRETED)


@triton.jit  # type: ignore[untyped-decorator]  # as above
def reverse_kernel(  # type: ignore[no-untyped-def]  # as above
    source, target, size, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr
):
    places = tl.arange(0, BLOCK)
    is_in = places < size
    a, b, c, d = load_four_here(source + 4 * places, is_in, INTERPRETED)
    store_four_here(
        target + 4 * places, d, c, b, a + 1.0, places < size + 1, INTERPRETED
    )


def test_elements_outside_the_mask_are_zero_and_stay(device: torch.device) -> None:
    source = torch.tensor([1.5, -2.0, 7.0, 9.0], device=device)
    for dtype in (float32, bfloat16, float16):
        target = torch.full((4,), 5.0, device=device, dtype=dtype)

        copy_kernel[(1,)](
            source.to(dtype), target, 2, BLOCK=4, INTERPRETED=is_interpreted()
        )

        assert target.tolist() == [2.5, -1.0, 1.0, 5.0]


def test_four_neighbours_are_one_element(device: torch.device) -> None:
    source: Tensor = torch.arange(16.0, device=device)
    target = torch.full((16,), 5.0, device=device)

    reverse_kernel[(1,)](source, target, 2, BLOCK=4, INTERPRETED=is_interpreted())

    expected = [3.0, 2.0, 1.0, 1.0, 7.0, 6.0, 5.0, 5.0, 0.0, 0.0, 0.0, 1.0, *[5.0] * 4]
    assert target.tolist() == expected
