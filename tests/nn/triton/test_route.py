"""Tests of `moxe_plugin.nn.triton.route`, against the router in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, float64, nan, tensor
from torch.testing import assert_close

from moxe_plugin.nn.difficulty_router import DifficultyRouter
from moxe_plugin.nn.routing import Routing
from moxe_plugin.nn.selection import TopKSelection

pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_tokens_of_a_step_have_the_scores_of_any(
    has_bias: bool, dtype: torch.dtype, device: torch.device
) -> None:
    router = DifficultyRouter(
        200,
        TopKSelection(9, 2),
        num_mlstm_experts=5,
        difficulty_bias_scale=0.7,
        bias=has_bias,
        backend="triton",
    ).to(device, dtype)
    with torch.no_grad():
        for param in router.parameters():
            param.normal_()
    hidden = torch.randn(3, 200, device=device).to(dtype)

    expected: Routing = router(hidden)
    with torch.no_grad():
        actual: Routing = router(hidden)

    for x, y in zip(actual, expected, strict=True):
        assert x is not None
        assert_close(x, y, rtol=1e-5, atol=1e-5)


def route_both(
    num_experts: int, top_k: int, num_mlstm: int, scores: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Return what the kernel and a router in float64 say of some scores."""
    from moxe_plugin.nn.triton.route import route_scores

    router = DifficultyRouter(
        num_experts + 1,
        TopKSelection(num_experts, top_k),
        num_mlstm_experts=num_mlstm,
        difficulty_bias_scale=0.7,
    ).to(scores.device, float64)
    # Its hidden states are the scores.
    with torch.no_grad():
        weight = torch.eye(num_experts + 1, dtype=float64, device=scores.device)
        router.weight.copy_(weight[:-1])
        router.difficulty_weight.copy_(weight[-1])

    routing: Routing = router(scores.double())
    actual = route_scores(
        scores,
        num_mlstm_experts=num_mlstm,
        difficulty_bias_scale=0.7,
        top_k=top_k,
    )
    expected = routing[1:]
    assert all(x is not None for x in expected)

    return list(actual), [x for x in expected if x is not None]


@pytest.mark.parametrize(
    ("num_experts", "top_k", "num_mlstm"), [(8, 2, 4), (5, 1, 2), (6, 6, 1), (2, 1, 1)]
)
def test_routing_and_gradients_are_the_routers(
    num_experts: int, top_k: int, num_mlstm: int, device: torch.device
) -> None:
    torch.manual_seed(5)
    # More than a block of tokens, and no multiple of it
    scores = torch.randn(70, num_experts + 1, device=device, requires_grad=True)

    actual, expected = route_both(num_experts, top_k, num_mlstm, scores)

    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y.to(x.dtype))

    floats = [i for i, x in enumerate(actual) if x.is_floating_point()]
    directions = [torch.randn_like(actual[i]) for i in floats]
    # A gradient of a mean is expanded.
    directions[1] = directions[1][:1].expand_as(directions[1])
    directions[2] = directions[2].t().contiguous().t()

    for x, y in zip(
        *(
            torch.autograd.grad(
                [outputs[i] for i in floats],
                [scores],
                [d.to(outputs[0].dtype) for d in directions],
            )
            for outputs in (actual, expected)
        ),
        strict=True,
    ):
        assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_ties_and_what_is_no_number_are_chosen_in_order(device: torch.device) -> None:
    scores = tensor(
        [[1.0, 1.0, 1.0, 1.0, 0.0], [nan, 0.0, 0.0, 0.0, 0.0], [0.0, 2.0, 1.0, 2.0, 9]],
        device=device,
    )
    actual, expected = route_both(4, 3, 2, scores)

    assert actual[4].tolist() == [[0, 1, 2], [0, 1, 2], [1, 3, 0]]
    assert actual[4].tolist() == expected[4].tolist()


@pytest.mark.parametrize("output", range(6))
def test_each_output_has_a_gradient_of_its_own(
    output: int, device: torch.device
) -> None:
    torch.manual_seed(6)
    scores = torch.randn(3, 5, device=device, requires_grad=True)
    both = route_both(4, 2, 2, scores)

    if output == 4:
        assert not both[0][output].requires_grad
        return

    direction = torch.randn_like(both[0][output])
    actual, expected = (
        torch.autograd.grad(
            outputs[output],
            [scores],
            direction.to(outputs[0].dtype),
            allow_unused=True,
            materialize_grads=True,
        )
        for outputs in both
    )
    assert_close(actual, expected)


def test_no_token_is_routed_nowhere(device: torch.device) -> None:
    scores = torch.zeros(0, 5, device=device, requires_grad=True)

    actual, _ = route_both(4, 2, 2, scores)
    (grad,) = torch.autograd.grad(actual[1].sum(), scores)

    assert [x.shape[0] for x in [*actual, grad]] == [0] * 7
