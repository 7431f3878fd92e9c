"""Tests of `moxe_plugin.nn.projected_loss`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, float64
from torch.autograd import grad
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from moxe_plugin.nn import projected_loss
from moxe_plugin.nn.projected_loss import projected_cross_entropy

T, M, V = 11, 5, 17


@pytest.fixture(params=[4, 11, 256], ids=["ragged_chunks", "one_chunk", "larger"])
def _chunk_size(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CHUNK_SIZE", "GPU_CHUNK_SIZE"):
        monkeypatch.setattr(projected_loss, name, request.param)


def make_inputs(
    device: torch.device, vocab_size: int = V
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.randn(T, M, device=device, dtype=float64).requires_grad_()
    weight = torch.randn(vocab_size, M, device=device, dtype=float64).requires_grad_()
    targets = torch.randint(vocab_size, (T,), device=device)
    target_weights = torch.rand(T, device=device, dtype=float64)
    target_weights[::3] = 0.0

    return hidden, weight, targets, target_weights


@pytest.mark.usefixtures("_chunk_size")
def test_loss_and_gradients_are_those_of_all_logits(device: torch.device) -> None:
    hidden, weight, targets, target_weights = make_inputs(device)

    nll = cross_entropy(hidden @ weight.mT, targets, reduction="none")
    expected = (nll * target_weights).sum()
    # An id that means nothing, where it does not count.
    targets = targets.where(target_weights > 0, -100)
    actual = projected_cross_entropy(hidden, weight, targets, target_weights)

    assert_close(actual, expected)
    leaves = [hidden, weight]
    assert_close(grad(3 * actual, leaves), grad(3 * expected, leaves))


@pytest.mark.usefixtures("_chunk_size")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_page_are_multiplied_as_others_are(
    dtype: torch.dtype, device: torch.device
) -> None:
    # 2,048 logits fill pages: products in C++ write them with a gap after each row.
    hidden, weight, targets, target_weights = make_inputs(device, vocab_size=2048)
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))

    logits = (hidden.double() @ weight.double().mT).to(dtype).double()
    nll = cross_entropy(logits, targets, reduction="none")
    expected = (nll * target_weights).sum()
    actual = projected_cross_entropy(hidden, weight, targets, target_weights)

    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
    assert_close(actual.double(), expected, rtol=1e-5, atol=0)
    assert_close(
        grad(actual, [hidden, weight]),
        grad(expected, [hidden, weight]),
        rtol=tolerance,
        atol=tolerance,
    )


def test_without_gradients_the_loss_is_the_same(device: torch.device) -> None:
    hidden, *others = make_inputs(device)

    expected = projected_cross_entropy(hidden, *others)
    with torch.no_grad():
        actual = projected_cross_entropy(hidden, *others)

    assert_close(actual, expected.detach(), rtol=0.0, atol=0.0)
    assert not actual.requires_grad


def test_one_leaf_alone_gets_its_gradient(device: torch.device) -> None:
    hidden, weight, *others = make_inputs(device)
    both = grad(projected_cross_entropy(hidden, weight, *others), [hidden, weight])

    of_hidden = projected_cross_entropy(hidden, weight.detach(), *others)
    of_weight = projected_cross_entropy(hidden.detach(), weight, *others)

    assert_close((*grad(of_hidden, hidden), *grad(of_weight, weight)), both)


def test_large_logits_do_not_overflow(device: torch.device) -> None:
    hidden, weight, targets, target_weights = make_inputs(device)

    loss = projected_cross_entropy(hidden * 1e5, weight, targets, target_weights)

    assert loss.isfinite()
    assert all(g.isfinite().all() for g in grad(loss, [hidden, weight]))


def test_no_tokens_have_no_loss(device: torch.device) -> None:
    hidden, weight, targets, target_weights = make_inputs(device)

    loss = projected_cross_entropy(hidden[:0], weight, targets[:0], target_weights[:0])

    assert loss == 0
    assert not grad(loss, weight)[0].any()


def test_autocast_projects_in_its_precision(device: torch.device) -> None:
    hidden, weight, targets, target_weights = make_inputs(device)
    hidden, weight = hidden.detach().float(), weight.detach().float().requires_grad_()

    with torch.autocast(device.type, torch.bfloat16):
        actual = projected_cross_entropy(hidden, weight, targets, target_weights)

    logits = (hidden.bfloat16() @ weight.bfloat16().mT).float()
    nll = cross_entropy(logits, targets, reduction="none")
    expected = (nll * target_weights).sum().float()

    # Products in C++ round no logits.
    assert_close(actual, expected, rtol=2**-9, atol=0)
    # bfloat16 has 8 bits of precision, of softmax and of the product's inputs.
    assert_close(grad(actual, weight), grad(expected, weight), rtol=2**-5, atol=2**-5)


@pytest.mark.usefixtures("_chunk_size")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_of_gpus_compute_the_same(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    hidden, weight, targets, target_weights = make_inputs(device)
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    # An id that means nothing, where it does not count.
    targets = targets.where(target_weights > 0, -100)
    inputs = (hidden, weight, targets, target_weights.float())

    monkeypatch.setattr(projected_loss, "runs_triton", lambda _: False)
    expected = projected_cross_entropy(*inputs)
    monkeypatch.setattr(projected_loss, "runs_triton", lambda _: True)
    actual = projected_cross_entropy(*inputs)

    # Torch rounds to bfloat16, Triton's interpreter truncates.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
    assert_close(actual, expected)
    assert_close(
        grad(3 * actual, [hidden, weight]),
        grad(3 * expected, [hidden, weight]),
        rtol=tolerance,
        atol=tolerance,
    )


def test_gradients_have_the_types_of_their_inputs(device: torch.device) -> None:
    hidden, weight, *others = make_inputs(device)
    hidden = hidden.detach().float().requires_grad_()
    weight = weight.detach().bfloat16().requires_grad_()

    for factor in (1, 2):
        loss = factor * projected_cross_entropy(hidden, weight, *others)
        dtypes = [x.dtype for x in grad(loss, [hidden, weight])]
        assert dtypes == [torch.float32, torch.bfloat16]
