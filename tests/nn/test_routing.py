"""Tests of `moxe_plugin.nn.routing`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, float64, tensor
from torch.testing import assert_close

from moxe_plugin.nn.difficulty_router import DifficultyRouter
from moxe_plugin.nn.modulation import (
    MaskedModulation,
    Modulation,
    ProportionalModulation,
    standard_modulation,
)
from moxe_plugin.nn.routing import Router, StandardRouter, normalized_entropy
from moxe_plugin.nn.selection import TopKSelection

MODEL_DIM, NUM_EXPERTS, TOP_K, NUM_TOKENS = 7, 5, 2, 11


def make_difficulty_router(
    device: torch.device,
    *,
    num_mlstm_experts: int = 2,
    scale: float = 0.8,
    modulation: Modulation = standard_modulation,
) -> DifficultyRouter:
    torch.manual_seed(1)

    router = DifficultyRouter(
        MODEL_DIM,
        TopKSelection(NUM_EXPERTS, TOP_K),
        num_mlstm_experts=num_mlstm_experts,
        difficulty_bias_scale=scale,
        modulation=modulation,
        bias=True,
    ).to(device, float64)

    with torch.no_grad():
        for param in router.parameters():
            param.normal_()

    return router


def make_hidden(device: torch.device) -> Tensor:
    torch.manual_seed(2)

    return torch.randn(NUM_TOKENS, MODEL_DIM, dtype=float64, device=device)


@pytest.mark.parametrize("num_mlstm_experts", [1, 2, 4])
@pytest.mark.parametrize(
    "modulation",
    [standard_modulation, MaskedModulation(0.5), ProportionalModulation(0.5)],
    ids=["standard", "masked", "proportional"],
)
def test_logits_follow_the_equations(
    modulation: Modulation, num_mlstm_experts: int, device: torch.device
) -> None:
    router = make_difficulty_router(
        device, num_mlstm_experts=num_mlstm_experts, modulation=modulation
    )
    hidden = make_hidden(device)

    routing = router(hidden)

    assert router.bias is not None
    assert routing.difficulty is not None

    for t in range(NUM_TOKENS):
        preact = (hidden[t] * router.difficulty_weight).sum() + router.difficulty_bias[
            0
        ]
        d = 1 / (1 + math.exp(-preact.item()))

        assert routing.difficulty[t].item() == pytest.approx(d, rel=1e-12)

        match modulation:
            case MaskedModulation():
                strength = d if d > 0.5 else 0.0
            case ProportionalModulation():
                strength = max(d - 0.5, 0.0)
            case _:
                strength = d

        logits = [
            ((hidden[t] * router.weight[i]).sum() + router.bias[i]).item()
            for i in range(NUM_EXPERTS)
        ]
        biased = [
            z + 0.8 * strength if i < num_mlstm_experts else z - 0.8 * strength
            for i, z in enumerate(logits)
        ]

        assert routing.router_logits[t].tolist() == pytest.approx(logits, rel=1e-12)
        assert routing.biased_logits[t].tolist() == pytest.approx(biased, rel=1e-12)

        for probs, scores in [
            (routing.unbiased_probs[t], logits),
            (routing.router_probs[t], biased),
        ]:
            total = sum(math.exp(z) for z in scores)
            expected = [math.exp(z) / total for z in scores]

            assert probs.tolist() == pytest.approx(expected, rel=1e-12)


def test_odds_of_the_groups_are_those_of_the_paper(device: torch.device) -> None:
    scale, num_mlstm = 0.8, 2

    router = make_difficulty_router(device, scale=scale, num_mlstm_experts=num_mlstm)

    routing = router(make_hidden(device))

    mlstm_odds = routing.router_probs[:, :num_mlstm].sum(1) / (
        routing.router_probs[:, num_mlstm:].sum(1)
    )

    exp_logits = routing.router_logits.exp()
    raw_odds = exp_logits[:, :num_mlstm].sum(1) / exp_logits[:, num_mlstm:].sum(1)

    # MoxE eqs. (23)-(43)
    assert_close(mlstm_odds, (2 * scale * routing.difficulty).exp() * raw_odds)


def test_bias_moves_hard_tokens_to_mlstm(device: torch.device) -> None:
    router = make_difficulty_router(device, scale=50.0)

    with torch.no_grad():
        router.difficulty_bias.fill_(30.0)

    routing = router(make_hidden(device))

    assert (routing.expert_indices < 2).all()


def test_expert_weights_are_the_largest_probabilities_renormalised(
    device: torch.device,
) -> None:
    routing = make_difficulty_router(device)(make_hidden(device))

    for t in range(NUM_TOKENS):
        probs = routing.router_probs[t].tolist()
        best = sorted(range(NUM_EXPERTS), key=lambda i: -probs[i])[:TOP_K]
        total = sum(probs[i] for i in best)

        assert routing.expert_indices[t].tolist() == best
        assert routing.expert_weights[t].tolist() == pytest.approx(
            [probs[i] / total for i in best], rel=1e-12
        )


@pytest.mark.parametrize("num_experts", [4, 33, 64])
def test_of_equal_experts_the_lower_index_wins(
    num_experts: int, device: torch.device
) -> None:
    router = StandardRouter(MODEL_DIM, TopKSelection(num_experts, 3)).to(device)

    with torch.no_grad():
        router.weight.zero_()

    routing = router(torch.randn(NUM_TOKENS, MODEL_DIM, device=device))

    assert routing.expert_indices.tolist() == [[0, 1, 2]] * NUM_TOKENS
    assert_close(routing.expert_weights, torch.full_like(routing.expert_weights, 1 / 3))


def test_permuting_experts_permutes_the_routing(device: torch.device) -> None:
    router = make_difficulty_router(device)
    hidden = make_hidden(device)

    expected = router(hidden)

    # Within the groups of 2 and 3.
    order = tensor([1, 0, 3, 4, 2], device=device)

    with torch.no_grad():
        assert router.bias is not None

        router.weight.copy_(router.weight[order])
        router.bias.copy_(router.bias[order])

    routing = router(hidden)

    assert_close(routing.router_probs, expected.router_probs[:, order])
    assert_close(routing.expert_weights, expected.expert_weights)
    assert_close(order[routing.expert_indices], expected.expert_indices)


def test_standard_router_has_no_difficulty_and_no_bias(device: torch.device) -> None:
    router = make_difficulty_router(device, scale=0.0)
    hidden = make_hidden(device)

    standard = StandardRouter(
        MODEL_DIM, TopKSelection(NUM_EXPERTS, TOP_K), bias=True
    ).to(device, float64)
    standard.load_state_dict(
        {n: p for n, p in router.state_dict().items() if "difficulty" not in n}
    )

    routing, expected = standard(hidden), router(hidden)

    assert routing.difficulty is None
    assert_close(routing.biased_logits, routing.router_logits)
    assert_close(routing.router_probs, expected.router_probs)
    assert_close(routing.expert_weights, expected.expert_weights)


def test_every_parameter_gets_the_gradient_of_finite_differences(
    device: torch.device,
) -> None:
    router = make_difficulty_router(device)
    params = dict(router.named_parameters())

    def weigh(hidden: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        routing = torch.func.functional_call(
            router, dict(zip(params, values, strict=True)), (hidden,)
        )
        return (routing.expert_weights, routing.unbiased_probs, routing.difficulty)

    hidden = make_hidden(device).requires_grad_()

    assert torch.autograd.gradcheck(weigh, (hidden, *params.values()))


@pytest.mark.parametrize("router_kls", [DifficultyRouter, StandardRouter])
def test_routing_is_float32_under_autocast_and_for_bfloat16(
    router_kls: type[Router], device: torch.device
) -> None:
    torch.manual_seed(3)

    selection = TopKSelection(NUM_EXPERTS, TOP_K)

    router: Router
    if router_kls is StandardRouter:
        router = StandardRouter(MODEL_DIM, selection, bias=True)
    else:
        router = DifficultyRouter(
            MODEL_DIM,
            selection,
            num_mlstm_experts=2,
            difficulty_bias_scale=0.3,
        )

    router.to(device)
    hidden = make_hidden(device).bfloat16()

    expected = router(hidden.float())

    with torch.autocast(device.type, dtype=torch.bfloat16):
        routing = router(hidden)

    for actual, reference in zip(routing, expected, strict=True):
        if reference is not None:
            assert actual.dtype == reference.dtype
            assert torch.equal(actual, reference)

    assert router.bfloat16()(hidden).router_probs.dtype == torch.float32


def test_reset_draws_lecun_normal_weights_and_zero_biases() -> None:
    with torch.device("meta"):
        router = DifficultyRouter(
            1000,
            TopKSelection(64, 2),
            num_mlstm_experts=32,
            difficulty_bias_scale=0.3,
            bias=True,
        )

    router.to_empty(device="cpu")

    torch.manual_seed(4)

    router.reset_parameters()

    assert router.bias is not None

    # The standard error of this estimate is 0.3 %, and 2.2 % for the vector.
    assert router.weight.std().item() == pytest.approx(1000**-0.5, rel=0.015)
    assert router.difficulty_weight.std().item() == pytest.approx(1000**-0.5, rel=0.1)
    assert router.weight.abs().max().item() <= 2 * 1000**-0.5 / 0.8796
    assert not router.bias.any()
    assert not router.difficulty_bias.any()


def test_parameters_all_have_a_dimension() -> None:
    router = make_difficulty_router(torch.device("cpu"))

    assert all(p.ndim >= 1 for p in router.parameters())
    assert not list(router.buffers())


@pytest.mark.parametrize(
    ("probs", "expected"),
    [
        pytest.param([0.25, 0.25, 0.25, 0.25], 1.0, id="uniform"),
        pytest.param([0.5, 0.5, 0.0, 0.0], 0.5, id="two_of_four"),
        pytest.param([0.0, 1.0, 0.0, 0.0], 0.0, id="certain"),
        pytest.param(
            [1 - 1e-9, 1e-9, 0.0, 0.0],
            (1e-9 * math.log(1e6) + 1e-9) / math.log(4),
            id="below_the_floor",
        ),
    ],
)
def test_normalized_entropy_is_a_share_of_the_maximum(
    probs: list[float], expected: float, device: torch.device
) -> None:
    entropy = normalized_entropy(tensor([probs], dtype=float64, device=device))

    assert entropy.tolist() == pytest.approx([expected], rel=1e-6, abs=1e-15)


def test_normalized_entropy_of_a_single_expert_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`probs` must be at least 2, but is 1"):
        normalized_entropy(torch.ones(3, 1))


@pytest.mark.parametrize("num_mlstm_experts", [0, NUM_EXPERTS])
def test_an_empty_group_is_refused(num_mlstm_experts: int) -> None:
    with pytest.raises(
        ValueError, match=r"^`num_mlstm_experts` must be greater than 0 and less than"
    ):
        make_difficulty_router(torch.device("cpu"), num_mlstm_experts=num_mlstm_experts)


@pytest.mark.parametrize("scale", [-0.1, math.nan])
def test_a_negative_bias_scale_is_refused(scale: float) -> None:
    with pytest.raises(
        ValueError, match=r"^`difficulty_bias_scale` must be greater than or equal to 0"
    ):
        make_difficulty_router(torch.device("cpu"), scale=scale)
