"""Tests of `moxe_plugin.nn.native.scale_norm`, against the norm in torch."""

from __future__ import annotations

from array import array

import pytest
import torch
from torch import Tensor, bfloat16, float32, float64
from torch.autograd import grad
from torch.nn.functional import layer_norm
from torch.testing import assert_close

from moxe_plugin.nn import passes
from moxe_plugin.nn.layers import NORM_EPS, ScaleNorm
from moxe_plugin.nn.native.library import why_not_loaded
from moxe_plugin.nn.native.scale_norm import (
    norm_rows,
    norm_rows_backward,
    scale_norm,
)
from tests.nn.bfloat16_cases import (
    assert_rounded_once,
    differentiate,
    in_each_dtype,
    needs_bfloat16,
)

needs_compiler = pytest.mark.skipif(
    why_not_loaded("scale_norm") is not None,
    reason=f"no C++ here: {why_not_loaded('scale_norm')}",
)

# Idle experts, and more rows than what the gradients sum at a time.
COUNTS = [
    pytest.param([3, 0, 70], id="idle"),
    pytest.param([0, 0, 0], id="no-row"),
    pytest.param([33, 32, 1], id="all"),
]


def make_inputs(
    counts: list[int], dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    # Far from 0, where a variance of squares would lose digits.
    flat = torch.randn(sum(counts), dim, dtype=dtype) + 50

    weight = torch.randn(len(counts), dim, dtype=dtype)

    return flat.requires_grad_(), weight.requires_grad_()


def norm_in_torch(
    flat: Tensor, weight: Tensor, counts: list[int], num_heads: int
) -> Tensor:
    heads = flat.unflatten(1, (num_heads, -1))
    normed = layer_norm(heads, heads.shape[-1:], eps=NORM_EPS).flatten(1)

    return normed * weight.repeat_interleave(torch.tensor(counts), dim=0)


@needs_compiler
@pytest.mark.parametrize("dtype", [float32, float64], ids=str)
@pytest.mark.parametrize("head_dim", [1, 7, 16, 40])
@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("counts", COUNTS)
def test_results_and_gradients_are_those_of_torch(
    counts: list[int], num_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    leaves = make_inputs(counts, num_heads * head_dim, dtype)

    expected = norm_in_torch(*leaves, counts, num_heads)
    actual = scale_norm(*leaves, counts, num_heads, NORM_EPS)

    upstream = torch.randn_like(expected)
    # float32 knows numbers near 50 to 4e-6; the norm of one channel divides by 3e-3.
    tol = 1e-9 if dtype == float64 else 1e-4
    assert_close(actual, expected, rtol=tol, atol=tol)
    assert_close(
        grad(actual, leaves, upstream),
        grad(expected, leaves, upstream),
        rtol=tol,
        atol=10 * tol,
    )


@needs_compiler
@needs_bfloat16
@pytest.mark.parametrize("head_dim", [1, 7, 16, 40])
@pytest.mark.parametrize("num_heads", [1, 3])
@pytest.mark.parametrize("counts", COUNTS)
def test_results_and_gradients_of_bfloat16_are_rounded_once(
    counts: list[int], num_heads: int, head_dim: int
) -> None:
    leaves = make_inputs(counts, num_heads * head_dim, bfloat16)

    def in_cpp(flat: Tensor, weight: Tensor) -> Tensor:
        return scale_norm(flat, weight, counts, num_heads, NORM_EPS)

    def in_torch(flat: Tensor, weight: Tensor) -> Tensor:
        return norm_in_torch(flat, weight, counts, num_heads)

    assert_rounded_once(
        differentiate(in_cpp, leaves, bfloat16),
        differentiate(in_torch, leaves, float64),
    )


@needs_compiler
def test_factors_and_gradients_may_lie_apart() -> None:
    leaves = make_inputs([5, 2], 12, float64)
    flat, weight = (x.detach().mT.contiguous().mT.requires_grad_() for x in leaves)
    upstream = torch.randn(12, 7, dtype=float64).mT

    expected = grad(scale_norm(*leaves, [5, 2], 2, NORM_EPS), leaves, upstream)
    normed = scale_norm(flat, weight, [5, 2], 2, NORM_EPS)
    actual = grad(normed, [flat, weight], upstream)

    assert_close(actual, expected, rtol=0, atol=0)


@needs_compiler
@pytest.mark.usefixtures("_restored_threads")
def test_threads_change_no_bit() -> None:
    counts = [100, 0, 37]
    leaves = make_inputs(counts, 24, float32)
    upstream = torch.randn(137, 24)

    results = []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        out = scale_norm(*leaves, counts, 3, NORM_EPS)
        results.append([out, *grad(out, leaves, upstream)])

    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))


@needs_compiler
@pytest.mark.parametrize("num_experts", [None, 3])
def test_module_computes_the_same_with_and_without_cpp(
    num_experts: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = ScaleNorm(12, num_heads=2, num_experts=num_experts).double()
    torch.nn.init.normal_(norm.weight)
    shape = (2, 5, 12) if num_experts is None else (num_experts, 2, 5, 12)
    seqs = torch.randn(shape, dtype=float64)
    assert type(norm(seqs).grad_fn).__name__ == "ViewBackward0"

    with_cpp = norm(seqs)
    monkeypatch.setattr(passes, "why_not_loaded", lambda _: "no compiler")

    assert_close(norm(seqs), with_cpp, rtol=0, atol=1e-12)
    assert type(norm(seqs).grad_fn).__name__ == "MulBackward0"


@needs_compiler
@in_each_dtype
@pytest.mark.parametrize("counts", COUNTS)
def test_residual_is_added(counts: list[int], dtype: torch.dtype) -> None:
    flat, weight = (x.detach() for x in make_inputs(counts, 36, dtype))
    upstream, residual = torch.randn(2, *flat.shape, dtype=dtype)
    lens = array("q", counts)
    alone, stats = norm_rows(flat, weight, lens, 2, NORM_EPS)
    of_alone = norm_rows_backward(upstream, flat, weight, stats, lens, NORM_EPS)

    rows, same_stats = norm_rows(flat, weight, lens, 2, NORM_EPS, residual)
    of_rows = norm_rows_backward(
        upstream, flat, weight, stats, lens, NORM_EPS, residual
    )

    # Of bfloat16 the sums alone are rounded.
    rtol = {bfloat16: 2**-7, float32: 1e-6, float64: 1e-14}[dtype]
    for x, y in ((rows, alone), (of_rows[0], of_alone[0])):
        assert_close(x, y + residual, rtol=rtol, atol=4 * rtol)
    assert torch.equal(same_stats, stats)
    assert torch.equal(of_rows[1], of_alone[1])
