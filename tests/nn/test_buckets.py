"""Tests of `moxe_plugin.nn.buckets`."""

from __future__ import annotations

import pytest
import torch
from torch import float64, tensor
from torch.autograd import grad
from torch.testing import assert_close

from moxe_plugin.nn.buckets import MAX_BUCKETS, find_buckets, from_buckets, to_buckets
from moxe_plugin.nn.rows import Rows, find_rows


def _rows(lens: list[list[int]], device: torch.device) -> Rows:
    return find_rows(tensor(lens, device=device), max(max(row) for row in lens))


def test_lengths_that_are_alike_stay_together(device: torch.device) -> None:
    buckets = find_buckets(_rows([[9, 8], [0, 9], [10, 9]], device))

    assert buckets.shapes == [(5, 10)]
    assert buckets.segments[0].tolist() == [4, 0, 3, 5, 1]
    assert buckets.seq_lens[0] is not None
    assert buckets.seq_lens[0].tolist() == [10, 9, 9, 9, 8]


def test_a_few_long_ones_do_not_pad_many_short_ones(device: torch.device) -> None:
    buckets = find_buckets(_rows([[100, 90], [3, 3], [3, 3], [3, 3]], device))

    assert buckets.shapes == [(2, 100), (6, 3)]
    # All of them are full.
    assert buckets.seq_lens[1] is None
    assert buckets.num_slots == 218


def test_there_are_not_more_buckets_than_a_few(device: torch.device) -> None:
    lens = [[2**n, 2**n] for n in range(12)]

    assert len(find_buckets(_rows(lens, device)).shapes) <= MAX_BUCKETS


def test_no_row_makes_no_bucket(device: torch.device) -> None:
    buckets = find_buckets(find_rows(tensor([[0, 0]], device=device), 4))

    assert buckets.shapes == []
    assert to_buckets(torch.zeros(0, 3, device=device), buckets) == []


@pytest.mark.parametrize(
    "lens", [[[1, 7], [0, 2]], [[5, 5], [5, 5]], [[0, 0], [0, 3]]], ids=str
)
def test_rows_go_there_and_back(lens: list[list[int]], device: torch.device) -> None:
    rows = _rows(lens, device)
    buckets = find_buckets(rows)
    flat = torch.randn(
        sum(rows.counts), 3, dtype=float64, device=device, requires_grad=True
    )

    parts = to_buckets(flat, buckets)

    begins = [sum(rows.seq_lens[:i]) for i in range(4)]
    for part, segments in zip(parts, buckets.segments, strict=True):
        for sequence, segment in zip(part, segments.tolist(), strict=True):
            length = rows.seq_lens[segment]
            begin = begins[segment]
            assert_close(sequence[:length], flat[begin : begin + length])
            assert not sequence[length:].any()

    back = from_buckets(parts, buckets)
    assert_close(back, flat, rtol=0, atol=0)

    upstream = torch.randn_like(back)
    assert_close(grad(back, flat, upstream)[0], upstream, rtol=0, atol=0)
