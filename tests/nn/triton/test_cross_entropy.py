"""Tests of `moxe_plugin.nn.triton.cross_entropy`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import grad
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

pytest.importorskip("triton")

from moxe_plugin.nn.triton.cross_entropy import cross_entropy_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Blocks have at most 4,096 columns.
SHAPES = [(5, 17), (3, 1), (2, 8193), (0, 4)]


def make_inputs(
    num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    logits = (3 * torch.randn(num_rows, num_columns, device=device)).to(dtype)
    targets = torch.randint(num_columns, (num_rows,), device=device)
    weights = torch.rand(num_rows, device=device)

    return logits, targets, weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "num_columns"), SHAPES)
def test_losses_and_gradient_are_those_of_torch(
    num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device
) -> None:
    logits, targets, weights = make_inputs(num_rows, num_columns, dtype, device)
    wide = logits.double().requires_grad_()

    expected = cross_entropy(wide, targets, reduction="none")
    expected_grad = grad(expected @ weights.double(), wide)[0]

    losses = cross_entropy_(logits.clone(), targets, weights, wants_grad=False)
    assert_close(losses, expected.float())

    losses = cross_entropy_(logits, targets, weights, wants_grad=True)
    assert_close(losses, expected.float())
    assert_close(logits, expected_grad.to(dtype))


def test_rows_without_weight_have_neither_loss_nor_gradient(
    device: torch.device,
) -> None:
    logits, targets, weights = make_inputs(3, 17, torch.float32, device)
    weights[1], targets[1], logits[1] = 0, -100, torch.inf

    losses = cross_entropy_(logits, targets, weights, wants_grad=True)

    assert losses[1] == 0
    assert not logits[1].any()
    assert logits.isfinite().all()


def test_target_that_is_no_column_has_no_number(device: torch.device) -> None:
    logits, targets, weights = make_inputs(3, 17, torch.float32, device)
    targets[0], targets[2] = 17, -1

    losses = cross_entropy_(logits, targets, weights, wants_grad=False)

    assert losses.isnan().tolist() == [True, False, True]


def test_large_logits_do_not_overflow(device: torch.device) -> None:
    logits, targets, weights = make_inputs(3, 8193, torch.float32, device)
    # Nothing but -inf in the first block
    logits[0, :5000] = -torch.inf
    targets[0] = 5001
    logits *= 1e30

    losses = cross_entropy_(logits, targets, weights, wants_grad=True)

    assert losses.isfinite().all()
    assert logits.isfinite().all()
