"""How uneven routers are made, and how uneven they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moxe_plugin.nn.routing import Router, StandardRouter
from moxe_plugin.nn.selection import TopKSelection
from moxe_plugin.speed.routers import ExpertLoads, skew_routers
from moxe_plugin.systems.catalogue import list_systems
from tests.models.families import create_model


def _routers(num_layers: int, *, bias: bool = True) -> nn.ModuleList:
    torch.manual_seed(1)

    return nn.ModuleList(
        StandardRouter(4, TopKSelection(6, top_k=2), bias=bias)
        for _ in range(num_layers)
    )


def _list(routers: nn.ModuleList) -> list[StandardRouter]:
    return [r for r in routers if isinstance(r, StandardRouter)]


def _bias(router: StandardRouter) -> Tensor:
    assert router.bias is not None

    return router.bias.data


def test_logits_are_moved_by_one_offset_per_expert() -> None:
    routers = _routers(1)
    (router,) = _list(routers)
    hidden = torch.randn(5, 4)

    before = router(hidden).router_logits
    skew_routers(routers, 0.5, seed=3)
    offsets = router(hidden).router_logits - before

    expected = 0.5 * torch.randn(6, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(offsets, expected.expand(5, 6))


def test_layers_differ_and_a_seed_repeats_them() -> None:
    first, second, other = (_routers(2) for _ in range(3))
    for routers, seed in ((first, 1), (second, 1), (other, 2)):
        skew_routers(routers, 1.0, seed)

    a, b, c = (
        [p for name, p in routers.named_parameters() if "bias" in name]
        for routers in (first, second, other)
    )

    assert not torch.equal(a[0], a[1])
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(a, c, strict=True))


def test_routers_without_bias_cannot_be_skewed() -> None:
    with pytest.raises(ValueError, match="`router_skew` needs routers with a bias"):
        skew_routers(_routers(1, bias=False), 1.0, seed=1)


@pytest.mark.usefixtures("fairseq2_setup")
def test_routers_of_every_ablation_can_be_skewed() -> None:
    archs = [s.arch for s in list_systems("tiny") if s.family == "moxe"]
    assert len(archs) > 3

    for arch in archs:
        model = create_model("moxe", arch)
        biases: list[Any] = [m.bias for m in model.modules() if isinstance(m, Router)]

        skew_routers(model, 1.0, seed=1)

        assert biases
        assert all((bias != 0.0).all() for bias in biases)


def test_busiest_expert_s_share_is_the_mean_over_layers() -> None:
    routers = _routers(2)
    first, second = layers = _list(routers)
    for router, bias in zip(layers, ([9, 8, 0, 0, 0, 0], [0] * 6), strict=True):
        router.weight.data.zero_()
        _bias(router).copy_(torch.tensor(bias))

    loads = ExpertLoads(routers)
    assert loads.busiest_share() is None

    with loads.counted():
        # Experts 0 and 1 get each token of the first layer.
        first(torch.zeros(3, 4))

        # Two tokens, each with two experts of its own.
        for chosen in (0, 2):
            _bias(second).zero_()
            _bias(second)[chosen : chosen + 2] = 1.0
            second(torch.zeros(1, 4))

    # No longer counted.
    second(torch.zeros(100, 4))

    assert loads.busiest_share() == pytest.approx((0.5 + 0.25) / 2)


def test_a_model_without_router_has_no_share() -> None:
    loads = ExpertLoads(nn.Linear(2, 2))

    with loads.counted():
        assert loads.busiest_share() is None
