"""Tests of `moxe_plugin.nn.losses`."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import compress
from typing import Any

import pytest
import torch
from torch import Tensor, float64, tensor
from torch.testing import assert_close

from moxe_plugin.nn.losses import (
    GroupLossForm,
    LoadBalancingForm,
    difficulty_loss,
    dynamic_loss,
    group_loss,
    load_balancing_loss,
    router_z_loss,
)

NUM_TOKENS, NUM_EXPERTS, NUM_MLSTM, TOP_K = 9, 5, 2, 2

MASK = [True, False, True, True, False, True, True, True, False]


@pytest.fixture
def logits(device: torch.device) -> Tensor:
    torch.manual_seed(5)

    return torch.randn(NUM_TOKENS, NUM_EXPERTS, dtype=float64, device=device)


def make_mask(masked: bool, device: torch.device) -> Tensor | None:
    return tensor(MASK, device=device) if masked else None


def list_valid(rows: Tensor, masked: bool) -> list[Any]:
    values = rows.tolist()

    return list(compress(values, MASK)) if masked else values


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


@pytest.mark.parametrize("masked", [False, True])
def test_difficulty_loss_follows_its_equations(
    logits: Tensor, masked: bool, device: torch.device
) -> None:
    probs, difficulty = logits.softmax(1), logits[:, 0].sigmoid()

    loss = difficulty_loss(difficulty, probs, make_mask(masked, device))

    expected = mean(
        [
            (d + sum(p * math.log(p) for p in row) / math.log(NUM_EXPERTS)) ** 2
            for d, row in zip(
                list_valid(difficulty, masked), list_valid(probs, masked), strict=True
            )
        ]
    )

    # MoxE eqs. (10), (11)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_entropy_target_passes_a_gradient_unless_it_is_stopped(
    logits: Tensor, stop_gradient: bool
) -> None:
    logits.requires_grad_()
    difficulty = torch.full_like(logits[:, 0], 0.2).requires_grad_()

    loss = difficulty_loss(difficulty, logits.softmax(1), stop_gradient=stop_gradient)

    torch.autograd.backward(loss)

    assert difficulty.grad is not None
    assert difficulty.grad.any()
    assert (logits.grad is None) == stop_gradient


def kl(pm: float, ps: float) -> float:
    return pm * math.log(2 * pm + 1e-8) + ps * math.log(2 * ps + 1e-8)


def js(pm: float, ps: float) -> float:
    def divergence(p: list[float], q: list[float]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    middle = [(pm + 0.5) / 2, (ps + 0.5) / 2]

    return (divergence([pm, ps], middle) + divergence([0.5, 0.5], middle)) / 2


GROUP_FORMULAS: dict[GroupLossForm, Callable[[float, float], float]] = {
    "kl": kl,
    "squared_difference": lambda pm, ps: (pm - ps) ** 2,
    "bounded": lambda pm, ps: (pm - 0.5) ** 2 + (ps - 0.5) ** 2,
    "js": js,
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", GROUP_FORMULAS)
def test_group_loss_follows_its_equations(
    logits: Tensor, form: GroupLossForm, masked: bool, device: torch.device
) -> None:
    probs = logits.softmax(1)

    loss = group_loss(probs, NUM_MLSTM, make_mask(masked, device), form=form)

    pm = mean([sum(row[:NUM_MLSTM]) for row in list_valid(probs, masked)])

    # MoxE eqs. (12)-(18); `js` leaves out the 1e-8 inside the logarithms.
    expected = GROUP_FORMULAS[form](pm, 1 - pm)
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=5e-8)


@pytest.mark.parametrize("form", GROUP_FORMULAS)
def test_group_loss_is_least_for_equal_groups(form: GroupLossForm) -> None:
    probs = tensor([[0.1, 0.4, 0.2, 0.2, 0.1]], dtype=float64, requires_grad=True)

    loss = group_loss(probs, NUM_MLSTM, form=form)

    torch.autograd.backward(loss)

    assert loss.item() == pytest.approx(0.0, abs=5e-8)

    assert probs.grad is not None
    slopes = probs.grad[0]
    # Along the simplex, from one group to the other, the loss is flat.
    assert_close(slopes[0], slopes[4], atol=1e-7, rtol=0)


@pytest.mark.parametrize("form", GROUP_FORMULAS)
def test_group_loss_of_a_collapsed_router_has_a_finite_gradient(
    form: GroupLossForm,
) -> None:
    probs = tensor([[1.0, 0.0, 0.0]], requires_grad=True)

    torch.autograd.backward(group_loss(probs, 1, form=form))

    assert probs.grad is not None
    assert probs.grad.isfinite().all()


@pytest.mark.parametrize("masked", [False, True])
def test_router_z_loss_follows_its_equation(
    logits: Tensor, masked: bool, device: torch.device
) -> None:
    loss = router_z_loss(logits, make_mask(masked, device))

    expected = mean(
        [
            math.log(sum(math.exp(z) for z in row)) ** 2
            for row in list_valid(logits, masked)
        ]
    )

    # MoxE eq. (19)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def switch(rows: list[list[float]], indices: list[list[int]]) -> float:
    num_choices = sum(map(len, indices))

    shares = [
        sum(row.count(i) for row in indices) / num_choices for i in range(NUM_EXPERTS)
    ]
    mean_probs = [mean([row[i] for row in rows]) for i in range(NUM_EXPERTS)]

    return NUM_EXPERTS * sum(f * p for f, p in zip(shares, mean_probs, strict=True))


def squared(rows: list[list[float]], indices: list[list[int]]) -> float:
    load = [0.0] * NUM_EXPERTS

    for row, chosen in zip(rows, indices, strict=True):
        for i in chosen:
            load[i] += row[i]

    num_choices = sum(map(len, indices))

    return sum((x / num_choices - 1 / NUM_EXPERTS) ** 2 for x in load)


@pytest.mark.parametrize("varies", [False, True], ids=["fixed", "varying"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("form", "formula"), [("switch", switch), ("squared", squared)]
)
def test_load_balancing_loss_follows_its_equation(
    logits: Tensor,
    form: LoadBalancingForm,
    formula: Callable[[list[list[float]], list[list[int]]], float],
    masked: bool,
    varies: bool,
    device: torch.device,
) -> None:
    probs = logits.softmax(1)
    indices = probs.topk(TOP_K, dim=1).indices

    if varies:
        indices[::2, 1] = -1

    loss = load_balancing_loss(probs, indices, make_mask(masked, device), form=form)

    chosen = [[i for i in row if i >= 0] for row in list_valid(indices, masked)]

    expected = formula(list_valid(probs, masked), chosen)

    # MoxE eq. (20), and the form of the authors' code
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_dynamic_loss_is_the_mean_entropy_in_nats(
    logits: Tensor, masked: bool, device: torch.device
) -> None:
    probs = logits.softmax(1)

    loss = dynamic_loss(probs, make_mask(masked, device))

    expected = mean(
        [-sum(p * math.log(p) for p in row) for row in list_valid(probs, masked)]
    )

    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_switch_loss_of_an_even_load_is_one() -> None:
    probs = torch.full((5, 5), 0.2)

    loss = load_balancing_loss(probs, torch.arange(5).unsqueeze(1))

    assert loss.item() == pytest.approx(1.0)


def compute_all_losses(logits: Tensor, token_mask: Tensor | None) -> list[Tensor]:
    probs, indices = logits.softmax(1), logits.topk(TOP_K, dim=1).indices

    return [
        difficulty_loss(logits[:, 0].sigmoid(), probs, token_mask),
        router_z_loss(logits, token_mask),
        *(group_loss(probs, NUM_MLSTM, token_mask, form=f) for f in GROUP_FORMULAS),
        load_balancing_loss(probs, indices, token_mask, form="switch"),
        load_balancing_loss(probs, indices, token_mask, form="squared"),
        dynamic_loss(probs, token_mask),
    ]


def test_masked_tokens_change_nothing(logits: Tensor, device: torch.device) -> None:
    mask = tensor(MASK, device=device)

    expected = compute_all_losses(logits[mask], None)

    logits = logits.where(mask.unsqueeze(1), 1e4).requires_grad_()

    losses = compute_all_losses(logits, mask)

    assert_close(losses, expected, rtol=1e-12, atol=1e-15)

    torch.autograd.backward(losses)

    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert not logits.grad[~mask].any()


def test_gradients_are_those_of_finite_differences(logits: Tensor) -> None:
    assert torch.autograd.gradcheck(
        lambda z: tuple(compute_all_losses(z, None)), logits.requires_grad_()
    )


def test_no_token_gives_zero_means(logits: Tensor) -> None:
    losses = compute_all_losses(logits, torch.zeros_like(logits[:, 0]).bool())

    assert all(loss.isfinite() for loss in losses)


def test_losses_of_bfloat16_inputs_are_float32(logits: Tensor) -> None:
    inputs = logits.bfloat16()

    for loss, expected in zip(
        compute_all_losses(inputs, None),
        compute_all_losses(inputs.float(), None),
        strict=True,
    ):
        assert loss.dtype == torch.float32
        # The probabilities themselves are rounded to 8 bits here.
        assert_close(loss, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("loss", "known"),
    [
        pytest.param(
            lambda p: group_loss(p, 1, form="tv"),  # type: ignore[arg-type]  # wrong
            "kl, squared_difference, bounded, js",
            id="group_loss",
        ),
        pytest.param(
            lambda p: load_balancing_loss(
                p,
                p.long(),
                form="tv",  # type: ignore[arg-type]  # wrong
            ),
            "switch, squared",
            id="load_balancing_loss",
        ),
    ],
)
def test_unknown_forms_list_the_known_ones(
    loss: Callable[[Tensor], Tensor], known: str
) -> None:
    with pytest.raises(
        ValueError, match=f"^`form` must be one of {known}, but is 'tv'"
    ):
        loss(torch.ones(1, 2))


@pytest.mark.parametrize("masked", [False, True])
def test_loss_of_layers_is_the_mean_of_theirs(
    masked: bool, device: torch.device
) -> None:
    torch.manual_seed(6)
    mask = make_mask(masked, device)
    layers = torch.randn(3, NUM_TOKENS, NUM_EXPERTS, dtype=float64, device=device)

    def losses(logits: Tensor) -> Tensor:
        probs, indices = logits.softmax(-1), logits.topk(TOP_K).indices

        return torch.stack(
            [
                difficulty_loss(logits[..., 0].sigmoid(), probs, mask),
                router_z_loss(logits, mask),
                dynamic_loss(probs, mask),
                *(group_loss(probs, NUM_MLSTM, mask, form=f) for f in GROUP_FORMULAS),
                load_balancing_loss(probs, indices, mask, form="switch"),
                load_balancing_loss(probs, indices, mask, form="squared"),
            ]
        )

    expected = torch.stack([losses(logits) for logits in layers]).mean(dim=0)

    assert_close(losses(layers.transpose(0, 1)), expected)
