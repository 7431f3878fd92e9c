"""Tests of `moxe_plugin.nn.native.router`, against the router in torch."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, bfloat16, float32, float64, nan
from torch.autograd import gradcheck
from torch.testing import assert_close

from moxe_plugin.nn import difficulty_router
from moxe_plugin.nn.difficulty_router import DifficultyRouter
from moxe_plugin.nn.modulation import MaskedModulation, standard_modulation
from moxe_plugin.nn.native.library import why_not_loaded
from moxe_plugin.nn.native.router import RouterParams, RouterSettings, route_tokens
from moxe_plugin.nn.routing import Routing
from moxe_plugin.nn.selection import (
    DynamicSelection,
    TopKSelection,
)
from tests.nn.bfloat16_cases import in_each_dtype

pytestmark = pytest.mark.skipif(
    why_not_loaded("router") is not None,
    reason=f"no C++ here: {why_not_loaded('router')}",
)

# Tokens, channels, experts, choices of each: more tokens than gradients sum at a time,
# and fewer; no whole vectors; no token.
SIZES = [(70, 40, 8, 2), (7, 33, 5, 3), (1, 64, 65, 1), (3, 16, 2, 2), (0, 16, 4, 2)]


def make_router(
    dim: int, num_experts: int, top_k: int, dtype: torch.dtype, *, has_bias: bool
) -> DifficultyRouter:
    router = DifficultyRouter(
        dim,
        TopKSelection(num_experts, top_k),
        num_mlstm_experts=num_experts // 2,
        difficulty_bias_scale=0.7,
        bias=has_bias,
    )
    with torch.no_grad():
        for param in router.parameters():
            param.normal_()
            # Scores of any number of channels are of one size.
            param.mul_(1 if param.numel() == 1 else dim**-0.5)

    return router.to(dtype)


def assert_equal(
    actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]
) -> None:
    for x, y in zip(actual, expected, strict=True):
        assert x is not None
        assert y is not None
        assert torch.equal(x, y)


def differentiate(
    router: DifficultyRouter, hidden: Tensor
) -> tuple[Routing, list[Tensor]]:
    """Return a routing, and the gradients of the tokens and all parameters."""
    hidden = hidden.detach().requires_grad_()
    routing: Routing = router(hidden)

    outputs = [x for x in routing if x is not None and x.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(x.shape, generator=generator, dtype=float64).to(x.dtype)
        for x in outputs
    ]
    # A gradient of a mean is expanded, that of a stack of layers a part.
    upstream[2] = upstream[2][:1].expand_as(upstream[2])
    upstream[3] = upstream[3].t().contiguous().t()

    return routing, list(
        torch.autograd.grad(outputs, [hidden, *router.parameters()], upstream)
    )


@in_each_dtype
@pytest.mark.parametrize("has_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_routing_and_gradients_are_those_of_torch(
    size: tuple[int, int, int, int], has_bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    num_tokens, dim, num_experts, top_k = size
    router = make_router(dim, num_experts, top_k, dtype, has_bias=has_bias)
    hidden = torch.randn(num_tokens, dim).to(dtype)
    wide = deepcopy(router).double()

    router.backend, wide.backend = "native", "torch"
    routing, grads = differentiate(router, hidden)
    expected_routing, expected_grads = differentiate(wide, hidden.double())

    functions = [x.router_logits.grad_fn for x in (routing, expected_routing)]
    assert [x is not None and "RouteTokens" in x.name() for x in functions] == [
        True,
        False,
    ]
    for x, y in zip(routing, expected_routing, strict=True):
        assert x is not None
        assert y is not None
        wide_dtype = torch.promote_types(dtype, torch.float32)
        assert x.dtype == (wide_dtype if x.is_floating_point() else torch.int64)
        assert_close(x, y.to(x.dtype))
    for x, y in zip(grads, expected_grads, strict=True):
        assert x.dtype == dtype
        rtol, atol = (2**-8, 1e-5) if dtype == bfloat16 else (1e-4, 1e-5)
        assert_close(x.double(), y, rtol=rtol, atol=atol)


@pytest.mark.parametrize("output", range(7))
def test_each_output_has_a_gradient_of_its_own(output: int) -> None:
    torch.manual_seed(3)
    router = make_router(5, 4, 2, float64, has_bias=True)
    params = RouterParams(
        *(router.weight, router.bias, router.difficulty_weight, router.difficulty_bias)
    )
    hidden = torch.randn(6, 5, dtype=float64, requires_grad=True)

    def route(*inputs: Tensor) -> Tensor:
        flat, *others = inputs

        routing = route_tokens(flat, RouterParams(*others), RouterSettings(2, 0.7, 2))
        result = routing[output]
        assert result is not None

        return result

    inputs = [hidden, *(x for x in params if x is not None)]
    if output == 5:
        assert not route(*inputs).requires_grad
        return

    assert gradcheck(route, inputs)


def test_ties_and_what_is_no_number_are_chosen_in_order() -> None:
    # Its hidden states are the scores, and there is no difficulty.
    scores = torch.tensor([[1.0, 1, 1, 1], [nan, 0, 0, 0], [0, 2, 1, 2]])
    params = RouterParams(torch.eye(4), None, torch.zeros(4), torch.zeros(1))

    routed = route_tokens(scores, params, RouterSettings(2, 0.0, 3))

    assert routed.expert_indices.tolist() == [[0, 1, 2], [0, 1, 2], [1, 3, 2]]


def test_a_token_is_routed_the_same_among_others_and_with_any_threads() -> None:
    torch.manual_seed(4)
    router = make_router(48, 8, 2, torch.float32, has_bias=False)
    hidden = torch.randn(101, 48)
    num_threads = torch.get_num_threads()

    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(differentiate(router, hidden))
    finally:
        torch.set_num_threads(num_threads)

    (expected, expected_grads), *others = results
    for routing, grads in others:
        assert_equal([*routing, *grads], [*expected, *expected_grads])
    assert_equal(router(hidden[50:51]), [x[50:51] for x in expected if x is not None])


@pytest.mark.parametrize(
    ("options", "dtype", "is_one_pass"),
    [
        pytest.param(
            {"selection": DynamicSelection(4, 0.6)}, float32, False, id="dynamic"
        ),
        pytest.param(
            {"modulation": MaskedModulation(0.5)}, float32, False, id="masked"
        ),
        pytest.param({}, float64, False, id="wider"),
        pytest.param({"backend": "torch"}, float32, False, id="torch"),
        pytest.param({}, bfloat16, True, id="narrower"),
        pytest.param({}, float32, True, id="standard"),
    ],
)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_only_the_standard_router_is_one_pass(
    options: dict[str, Any],
    dtype: torch.dtype,
    is_one_pass: bool,
    autocast: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    standard = {"selection": TopKSelection(4, 2), "modulation": standard_modulation}
    router = DifficultyRouter(
        8, num_mlstm_experts=2, difficulty_bias_scale=1.0, **{**standard, **options}
    )
    calls = []

    def count(*args: object) -> object:
        calls.append(args)

        return route_tokens(*args)  # type: ignore[arg-type]  # those of the router

    monkeypatch.setattr(difficulty_router, "route_tokens", count)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        router(torch.randn(3, 8).to(dtype))

    assert len(calls) == is_one_pass
