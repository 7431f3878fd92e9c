"""Tests of `moxe_plugin.nn.native.cross_entropy`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, bfloat16, float32, float64
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from moxe_plugin.nn.native.cross_entropy import SUFFIXES, cross_entropy_
from moxe_plugin.nn.native.library import why_not_loaded

pytestmark = pytest.mark.skipif(
    why_not_loaded("cross_entropy") is not None,
    reason=f"no C++ here: {why_not_loaded('cross_entropy')}",
)


def make_inputs(
    num_rows: int, num_columns: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    logits = (4 * torch.randn(num_rows, num_columns)).to(dtype)
    targets = torch.randint(num_columns, (num_rows,))
    weights = torch.rand(num_rows, dtype=torch.promote_types(dtype, float32))
    weights[0] = 0

    return logits, targets, weights


@pytest.mark.parametrize("dtype", SUFFIXES)
@pytest.mark.parametrize("num_columns", [1, 15, 64, 1024, 2077])
def test_losses_and_gradients_are_those_of_torch(
    num_columns: int, dtype: torch.dtype
) -> None:
    logits, targets, weights = make_inputs(7, num_columns, dtype)

    leaf = logits.to(weights.dtype).requires_grad_()
    expected = cross_entropy(leaf, targets, reduction="none")
    (expected * weights).sum().backward()
    assert leaf.grad is not None

    actual = cross_entropy_(logits, targets, weights, wants_grad=True)

    # Of numbers below 1, a one-hot is subtracted.
    atol = {float64: 1e-14, float32: 1e-6, bfloat16: 1e-6}[dtype]
    assert_close(actual, expected.detach(), rtol=atol, atol=atol)
    assert_close(
        logits, leaf.grad.to(dtype), rtol=1e-2 if dtype == bfloat16 else atol, atol=atol
    )


@pytest.mark.parametrize("dtype", SUFFIXES)
def test_rows_of_logits_may_lie_apart(dtype: torch.dtype) -> None:
    logits, targets, weights = make_inputs(5, 40, dtype)
    wide = torch.full((5, 47), 9, dtype=dtype)
    wide[:, :40] = logits

    actual = cross_entropy_(wide[:, :40], targets, weights, wants_grad=True)

    expected = cross_entropy_(logits, targets, weights, wants_grad=True)
    assert torch.equal(actual, expected)
    assert torch.equal(wide[:, :40], logits)
    assert (wide[:, 40:] == 9).all()


@pytest.mark.parametrize("dtype", SUFFIXES)
def test_logits_stay_as_they_are_if_no_gradient_is_wanted(dtype: torch.dtype) -> None:
    logits, targets, weights = make_inputs(3, 40, dtype)
    before = logits.clone()

    losses = cross_entropy_(logits, targets, weights, wants_grad=False)

    assert torch.equal(logits, before)
    with_grad = cross_entropy_(logits, targets, weights, wants_grad=True)
    assert torch.equal(losses, with_grad)


@pytest.mark.parametrize("at", [3, 32])
def test_nan_is_not_hidden(at: int) -> None:
    logits, targets, weights = make_inputs(2, 33, float32)
    logits[1, at] = torch.nan

    losses = cross_entropy_(logits, targets, weights, wants_grad=True)

    assert losses.isnan().tolist() == [False, True]
    assert logits.isnan().all(dim=1).tolist() == [False, True]


def test_large_logits_do_not_overflow() -> None:
    logits, targets, weights = make_inputs(4, 33, float32)
    logits *= 1e30

    losses = cross_entropy_(logits, targets, weights, wants_grad=True)

    assert losses.isfinite().all()
    assert logits.isfinite().all()


@pytest.mark.parametrize("target", [-1, 5])
def test_target_that_is_no_column_is_refused(target: int) -> None:
    logits, targets, weights = make_inputs(4, 5, float32)
    targets[2] = target

    with pytest.raises(IndexError, match=f"`targets` must be from 0 to 4.*{target}"):
        cross_entropy_(logits, targets, weights, wants_grad=True)


def test_no_row_has_no_loss() -> None:
    none = torch.empty(0)

    losses = cross_entropy_(
        torch.empty(0, 5), torch.empty(0, dtype=torch.int64), none, wants_grad=True
    )

    assert losses.shape == (0,)
