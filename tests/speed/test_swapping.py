"""Our products in modules of transformers."""

from __future__ import annotations

import pytest
import torch
from fairseq2.nn import BatchLayout
from torch import Tensor, nn
from torch.nn import functional

from moxe_plugin.nn import products
from moxe_plugin.speed.swapping import check_swap, swapped_linear
from tests.models.families import create_model


@pytest.fixture
def factors(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Collect the shapes of the right factors of our products."""
    shapes: list[tuple[int, ...]] = []
    original = products.multiply

    def multiply(lhs: Tensor, rhs: Tensor) -> Tensor:
        shapes.append(tuple(rhs.shape))

        return original(lhs, rhs)

    monkeypatch.setattr(products, "multiply", multiply)

    return shapes


def _train(model: nn.Module) -> list[Tensor]:
    seqs = torch.arange(14).view(2, 7)
    loss = model(seqs, BatchLayout.of(seqs), seqs, reduction="mean")
    loss.backward()

    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)

    return [loss.detach(), *grads]


@pytest.mark.usefixtures("fairseq2_setup")
@pytest.mark.parametrize("family", ["gemma2", "qwen_moe"])
def test_every_linear_layer_multiplies_by_ours_and_the_step_stays_the_same(
    family: str, factors: list[tuple[int, ...]]
) -> None:
    torch.manual_seed(1)
    model = create_model(family, dtype=torch.float32).train()

    shapes: list[tuple[int, ...]] = []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda layer, *_: shapes.append(tuple(layer.weight.t().shape))
            )

    expected = _train(model)
    assert not factors
    shapes.clear()

    with swapped_linear():
        actual = _train(model)

    # Each layer has a product of its own in the forward pass, two in the backward pass.
    assert factors[: len(shapes)] == shapes
    assert len(factors) == 3 * len(shapes) > 0
    assert len(actual) == len(expected) > 2
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_bias_is_added(factors: list[tuple[int, ...]]) -> None:
    layer, inputs = nn.Linear(5, 3), torch.randn(2, 1, 5)
    expected = layer(inputs)

    with swapped_linear():
        actual = layer(inputs)

    assert factors == [(5, 3)]
    torch.testing.assert_close(actual, expected)


def test_other_types_keep_torch_s_product(factors: list[tuple[int, ...]]) -> None:
    layer, inputs = nn.Linear(5, 3).double(), torch.randn(4, 5).double()
    expected = layer(inputs)

    with swapped_linear():
        assert torch.equal(layer(inputs), expected)

    assert not factors


def test_torch_has_its_product_back_even_after_an_error() -> None:
    original = functional.linear

    with pytest.raises(TypeError, match="iter"), swapped_linear():
        iter(functional.linear)  # type: ignore[call-overload]  # the error

    assert functional.linear is original


@pytest.mark.parametrize(
    ("device", "precision", "reason", "message"),
    [
        ("cuda", "float32", None, "`swap_linear` needs `device` cpu .* 'cuda' and"),
        ("cpu", "autocast", None, "`swap_linear` needs .* 'autocast' instead"),
        ("cpu", "float32", "it rains", "must be false .* since it rains"),
    ],
    ids=["device", "precision", "no_products"],
)
def test_a_swap_that_would_change_nothing_is_refused(
    device: str,
    precision: str,
    reason: str | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "why_torch", lambda: reason)

    with pytest.raises(ValueError, match=message):
        check_swap(torch.device(device), precision)


def test_a_swap_that_changes_products_is_not_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "why_torch", lambda: None)

    check_swap(torch.device("cpu"), "float32")
