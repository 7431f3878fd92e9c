"""Tests of `moxe_plugin.nn.rows`."""

from __future__ import annotations

import pytest
import torch
from torch import float64, tensor
from torch.autograd import grad
from torch.testing import assert_close

from moxe_plugin.nn.rows import find_rows, pack, unpack

LENS = [
    pytest.param([[2, 0, 3], [0, 0, 0], [1, 3, 0]], id="idle-expert"),
    pytest.param([[0, 0, 0], [0, 0, 0], [0, 0, 0]], id="no-row"),
    pytest.param([[3, 3, 3], [3, 3, 3], [3, 3, 3]], id="full"),
]


@pytest.mark.parametrize("lens", LENS)
def test_rows_come_by_expert_sequence_and_time(
    lens: list[list[int]], device: torch.device
) -> None:
    grid = torch.randn(3, 3, 3, 4, dtype=float64, device=device, requires_grad=True)
    rows = find_rows(tensor(lens, device=device), 3)

    places = [(e, n, t) for e in range(3) for n in range(3) for t in range(lens[e][n])]
    expected = torch.stack([grid[p] for p in places]) if places else grid[0, 0, :0]

    assert rows.counts == [sum(row) for row in lens]
    actual = pack(grid, rows)
    assert_close(actual, expected, rtol=0, atol=0)

    upstream = torch.randn_like(actual)
    assert_close(
        grad(actual, grid, upstream), grad(expected, grid, upstream), rtol=0, atol=0
    )


@pytest.mark.parametrize("lens", LENS)
def test_unpacking_puts_rows_back_and_zeros_between(
    lens: list[list[int]], device: torch.device
) -> None:
    rows = find_rows(tensor(lens, device=device), 3)
    flat = torch.randn(
        sum(rows.counts), 4, dtype=float64, device=device, requires_grad=True
    )

    grid = unpack(flat, rows)

    assert_close(pack(grid, rows), flat, rtol=0, atol=0)
    assert int((grid != 0).any(dim=-1).sum()) == flat.size(0)

    upstream = torch.randn_like(grid)
    assert_close(grad(grid, flat, upstream)[0], pack(upstream, rows), rtol=0, atol=0)
