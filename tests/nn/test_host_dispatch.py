"""Tests of `moxe_plugin.nn.host_dispatch`, against the dispatch to grids."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, bfloat16, float32, float64
from torch.autograd import grad
from torch.testing import assert_close

from moxe_plugin.nn import host_dispatch, passes
from moxe_plugin.nn.dispatch import combine, dispatch, plan_dispatch
from moxe_plugin.nn.experts import SparseExperts
from moxe_plugin.nn.host_dispatch import combine_rows, plan_rows, send_tokens
from moxe_plugin.nn.native.library import why_not_loaded
from moxe_plugin.nn.native.row_dispatch import sum_choices, sum_choices_backward
from moxe_plugin.nn.rows import find_rows, pack, unpack
from moxe_plugin.nn.slstm import SLSTMBlock
from tests.nn.bfloat16_cases import assert_rounded_once, needs_bfloat16
from tests.nn.expert_cases import make_case, make_experts

needs_compiler = pytest.mark.skipif(
    why_not_loaded("row_dispatch") is not None,
    reason=f"no C++ here: {why_not_loaded('row_dispatch')}",
)

WIDTH = 37

BATCHES = [
    # Sequences, length, choices, banks, with a mask, with empty places, idle expert
    pytest.param((3, 45, 2, [2, 3], False, False, None), id="full"),
    pytest.param((3, 45, 2, [2, 3], True, False, None), id="masked"),
    pytest.param((2, 7, 3, [3, 2], True, True, 1), id="empty_places-idle_expert"),
    pytest.param((70, 1, 1, [20], False, False, 4), id="one_bank-one_choice"),
    pytest.param((2, 3, 1, [1, 1], False, False, 0), id="idle_bank"),
    pytest.param((2, 0, 1, [1, 1], False, False, None), id="no_token"),
]

Batch = tuple[int, int, int, list[int], bool, bool, int | None]


def draw_choices(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Return experts and a mask."""
    num_seqs, seq_len, top_k, bank_sizes, has_mask, has_empty, idle = batch

    scores = torch.rand(num_seqs, seq_len, sum(bank_sizes))
    if idle is not None:
        scores[..., idle] = -1.0
    indices = scores.topk(top_k).indices

    if has_empty:
        indices[..., 1:] = indices[..., 1:].where(indices[..., 1:] % 2 == 0, -1)

    mask = None
    if has_mask:
        mask = torch.arange(seq_len) < torch.tensor([[0], [seq_len], [9]])[:num_seqs]

    return indices, mask


@needs_compiler
@pytest.mark.parametrize("dtype", [float32, float64], ids=str)
@pytest.mark.parametrize("batch", BATCHES[:-1])
def test_rows_sums_and_gradients_are_those_of_grids(
    batch: Batch, dtype: torch.dtype
) -> None:
    indices, mask = draw_choices(batch)
    num_seqs, seq_len, top_k, bank_sizes, *_ = batch
    tokens = torch.randn(num_seqs * seq_len, WIDTH, dtype=dtype, requires_grad=True)
    weights = torch.rand(num_seqs * seq_len, top_k, dtype=dtype, requires_grad=True)
    # Banks differ in what they do with their rows.
    scales = [torch.randn(WIDTH, dtype=dtype, requires_grad=True) for _ in bank_sizes]

    plan = plan_rows(indices, mask, bank_sizes)
    banks = send_tokens(tokens, plan)
    actual = combine_rows(
        [torch.sin(x * y) for x, y in zip(banks, scales, strict=True)], weights, plan
    )

    grid_plan = plan_dispatch(indices, mask, bank_sizes)
    outputs = []
    for flat, rows, grid, lens, scale in zip(
        *(banks, plan.banks, dispatch(tokens, grid_plan), grid_plan.grid_lens, scales),
        strict=True,
    ):
        expected_rows = find_rows(lens, grid.size(2))
        expected_flat = pack(grid, expected_rows)

        assert rows.counts == expected_rows.counts
        assert rows.seq_lens == expected_rows.seq_lens
        assert torch.equal(rows.segment_of_row, expected_rows.segment_of_row)
        assert torch.equal(rows.step_of_row, expected_rows.step_of_row)
        assert torch.equal(flat, expected_flat)
        # In its own grid, which is as long as its longest sub-sequence.
        begins = rows.segment_of_row * max(rows.seq_lens)
        assert torch.equal(rows.slot_of_row, begins + rows.step_of_row)
        assert torch.equal(pack(unpack(flat, rows), rows), flat)
        outputs.append(unpack(torch.sin(expected_flat * scale), expected_rows))
    expected = combine(outputs, weights, grid_plan)

    leaves = [tokens, weights, *scales]
    upstream = torch.randn_like(actual)
    tol = 1e-12 if dtype == float64 else 1e-5
    assert_close(actual, expected, rtol=tol, atol=tol)
    assert_close(
        grad(actual, leaves, upstream),
        grad(expected, leaves, upstream),
        rtol=tol,
        atol=tol,
    )


@needs_compiler
def test_no_token_is_no_row() -> None:
    indices, _ = draw_choices(BATCHES[-1].values[0])  # type: ignore[arg-type]  # pytest leaves them untyped
    tokens = torch.zeros(0, WIDTH, requires_grad=True)
    plan = plan_rows(indices, None, [1, 1])

    summed = combine_rows(send_tokens(tokens, plan), torch.zeros(0, 1), plan)
    summed.sum().backward()

    assert summed.shape == (0, WIDTH)
    assert plan.num_rows == [0, 0]
    assert tokens.grad is not None


@needs_compiler
@pytest.mark.usefixtures("_restored_threads")
def test_threads_change_no_bit() -> None:
    row_of_choice = torch.randperm(80).view(40, 2)
    row_of_choice[3] = -1
    banks = [torch.randn(50, WIDTH), torch.randn(30, WIDTH)]
    weights, upstream = torch.rand(40, 2), torch.randn(40, WIDTH)
    is_row = torch.zeros(80, dtype=torch.bool)
    is_row[row_of_choice[row_of_choice >= 0]] = True

    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        summed = sum_choices(banks, weights, row_of_choice)
        rows, of_weights = sum_choices_backward(
            *(upstream, banks, weights, row_of_choice)
        )
        # Rows of no choice are not set.
        results.append([summed, rows[is_row], of_weights])

    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))
    assert (results[0][0][3] == 0).all()


@needs_compiler
@needs_bfloat16
@pytest.mark.parametrize("width", [1, 32, WIDTH])
@pytest.mark.parametrize("top_k", [1, 3])
def test_sums_and_gradients_of_bfloat16_are_rounded_once(
    top_k: int, width: int
) -> None:
    row_of_choice = torch.randperm(40 * top_k).view(40, top_k)
    row_of_choice[3] = -1
    row_of_choice[5, 0] = -1
    is_row = torch.zeros(40 * top_k, dtype=torch.bool)
    is_row[row_of_choice[row_of_choice >= 0]] = True
    banks = [torch.randn(n, width).bfloat16() for n in (25, 0, 40 * top_k - 25)]
    weights, upstream = torch.rand(40, top_k), torch.randn(40, width).bfloat16()

    def run(dtype: torch.dtype) -> list[Tensor]:
        rows = [bank.to(dtype) for bank in banks]
        wide = weights.to(torch.promote_types(dtype, float32))
        of_rows, of_weights = sum_choices_backward(
            *(upstream.to(dtype), rows, wide, row_of_choice)
        )

        return [
            sum_choices(rows, wide, row_of_choice),
            sum_choices(rows, None, row_of_choice),
            # Rows of no choice are not set.
            of_rows[is_row],
            of_weights,
        ]

    *actual, of_weights = run(bfloat16)
    *expected, expected_of_weights = run(float64)

    assert_rounded_once(actual, expected)
    assert of_weights.dtype == float32
    assert_close(of_weights, expected_of_weights.float(), rtol=1e-5, atol=1e-5)


@needs_compiler
def test_experts_send_tokens_so_where_no_state_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_calls = 0

    def count(*args: Any) -> Tensor:
        nonlocal num_calls
        num_calls += 1

        return combine_rows(*args)

    monkeypatch.setattr(host_dispatch, "combine_rows", count)
    device = torch.device("cpu")
    experts = make_experts("subsequence", (2, 3, 0), device)
    case = make_case(device)

    def run(module: SparseExperts, *, return_state: bool) -> Tensor:
        output, _ = module(case.seqs, case.routing, None, return_state=return_state)

        return output  # type: ignore[no-any-return]  # of a module

    expected = run(experts, return_state=True)
    assert num_calls == 0
    assert_close(run(experts, return_state=False), expected)
    assert num_calls == 1

    with monkeypatch.context() as patch:
        patch.setattr(passes, "why_not_loaded", lambda _: "no compiler")
        assert_close(run(experts, return_state=False), expected)
    for bank in experts.children():
        if isinstance(bank, SLSTMBlock):
            bank.backend = "torch"
    assert_close(run(experts, return_state=False), expected)
    assert num_calls == 1


@needs_compiler
@needs_bfloat16
def test_experts_of_bfloat16_send_tokens_so_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = torch.device("cpu")
    experts = make_experts("subsequence", (2, 3, 0), device).bfloat16()
    case = make_case(device)
    routing = case._replace(weights=case.weights.float()).routing
    seqs = case.seqs.bfloat16()

    def run(dtype: torch.dtype, *, return_state: bool) -> list[Tensor]:
        module, x = deepcopy(experts).to(dtype), seqs.to(dtype).requires_grad_()
        weights = routing.expert_weights.to(torch.promote_types(dtype, float32))
        weights = weights.detach().requires_grad_()
        output, _ = module(
            *(x, routing._replace(expert_weights=weights), None),
            return_state=return_state,
        )

        return [output, *grad(output.sum(), [x, weights])]

    exact = run(float64, return_state=True)
    in_grids = run(bfloat16, return_state=True)
    calls: list[object] = []

    def count(*args: Any) -> Tensor:
        calls.append(args)

        return combine_rows(*args)

    monkeypatch.setattr(host_dispatch, "combine_rows", count)
    in_rows = run(bfloat16, return_state=False)

    assert len(calls) == 1
    assert [x.dtype for x in in_rows] == [bfloat16, bfloat16, float32]
    # What all functions of the blocks round adds up.
    for x, y, z in zip(in_rows, in_grids, exact, strict=True):
        error, error_in_grids = ((w.double() - z).norm() / z.norm() for w in (x, y))
        assert error <= max(0.02, 1.2 * error_in_grids.item())

    monkeypatch.setattr(passes, "rounds_to_bfloat16", lambda: False)
    assert_close(run(bfloat16, return_state=False)[0], in_grids[0], rtol=0.02, atol=0.1)
    assert len(calls) == 1
