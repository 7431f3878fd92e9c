"""Tests of `moxe_plugin.nn.rows`."""

from __future__ import annotations

import pytest
import torch
from torch import float64, tensor
from torch.autograd import grad
from torch.testing import assert_close

from moxe_plugin.nn.layers import CausalConv
from moxe_plugin.nn.rows import find_rows, last_rows, pack, unpack

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


@pytest.mark.parametrize("lens", LENS)
@pytest.mark.parametrize("has_window", [False, True], ids=["begin", "window"])
def test_convolution_of_rows_is_that_of_the_grid(
    lens: list[list[int]], has_window: bool, device: torch.device
) -> None:
    seq_lens = tensor(lens, device=device)
    conv = CausalConv(4, kernel_size=4, num_experts=3).to(device, float64)
    grid = torch.randn(3, 3, 3, 4, dtype=float64, device=device, requires_grad=True)
    window = torch.randn(3, 3, 3, 4, dtype=float64, device=device, requires_grad=True)
    rows = find_rows(seq_lens, 3)

    before = window if has_window else torch.zeros_like(window)
    expected, expected_window = conv(grid, before, seq_lens)
    expected = pack(expected, rows)

    flat = pack(grid, rows)
    actual = conv.convolve_rows(flat, rows, window if has_window else None)
    actual_window = last_rows(flat, rows, before)

    assert_close(actual, expected)
    assert_close(actual_window, expected_window, rtol=0, atol=0)

    inputs = [grid, *conv.parameters(), *([window] if has_window else [])]
    upstream = torch.randn_like(actual), torch.randn_like(actual_window)
    assert_close(
        grad([actual, actual_window], inputs, upstream),
        grad([expected, expected_window], inputs, upstream),
    )
