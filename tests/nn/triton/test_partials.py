"""Tests of `moxe_plugin.nn.triton.partials`, against sums over slots."""

from __future__ import annotations

import pytest
import torch
from torch import bfloat16, float32
from torch.testing import assert_close

from moxe_plugin.nn.ragged import ragged_rows

pytest.importorskip("triton")

from moxe_plugin.nn.triton.partials import MAX_PARTS, PartialSums

# An expert boundary within a block, experts without a row, and one with many blocks
LENS = [[5, 0], [0, 0], [1, 39], [200, 103], [0, 0]]


@pytest.mark.parametrize("dtype", [float32, bfloat16], ids=str)
def test_sums_of_several_kernels_are_those_of_each(
    dtype: torch.dtype, device: torch.device
) -> None:
    rows = ragged_rows(LENS, device)
    kernels: list[tuple[int, list[tuple[int, ...]]]] = [
        (32, [(5, 40)]),
        (8, [(5, 3, 700), (5, 30), (5, 2, 5)]),
        (512, [(5, 1), (5, 64)]),
    ]
    sums, expected = PartialSums(rows), []

    for rows_per_block, shapes in kernels:
        params = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        slots = sums.new_slots(rows_per_block, params)
        slots.copy_(torch.randn(slots.shape, device=device))

        of_expert = []
        begin = 0
        for expert, count in enumerate(rows.counts):
            # Blocks that have rows of the expert
            blocks = range(
                begin // rows_per_block, -(-(begin + count) // rows_per_block)
            )
            at = [b + expert for b in blocks if count > 0]
            of_expert.append(slots[at].double().sum(0))
            begin += count
        widths = [x[0].numel() for x in params]
        expected += [
            x.reshape(shape)
            for x, shape in zip(
                torch.stack(of_expert).split(widths, dim=1), shapes, strict=True
            )
        ]

    actual = sums.add_up()

    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == dtype
        assert x.is_contiguous()
        # The interpreter rounds to bfloat16 by cutting off.
        tolerance = 2**-7 if dtype == bfloat16 else 1e-5
        assert_close(x.double(), y, rtol=tolerance, atol=1e-5)


def test_number_of_kernels_is_checked(device: torch.device) -> None:
    rows = ragged_rows([[3]], device)
    sums = PartialSums(rows)

    for _ in range(MAX_PARTS):
        sums.new_slots(32, [torch.zeros(4, device=device)])

    with pytest.raises(ValueError, match="No more than 4 kernels may leave sums"):
        sums.new_slots(32, [torch.zeros(4, device=device)])
