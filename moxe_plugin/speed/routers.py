"""How evenly the routers of MoxE send tokens to their experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moxe_plugin.nn.routing import Router, Routing
from moxe_plugin.nn.statistics import count_expert_loads


def skew_routers(model: nn.Module, std: float, seed: int) -> None:
    """Make routers prefer some experts, as trained ones do.

    Each expert's logit gets a fixed offset, through the router's bias; each router
    draws its own.

    :param model: The model.
    :param std: The standard deviation of the offsets; they are normal.
    :param seed: Seeds them.

    :raises ValueError: A router has no bias.
    """
    generator = torch.Generator().manual_seed(seed)

    for router in _list_routers(model):
        if router.bias is None:
            raise ValueError(
                f"`router_skew` needs routers with a bias, but is {std} and they have "
                "none. Set it to 0, or `router_bias` to true."
            )

        with torch.no_grad():
            offsets = torch.randn(router.num_experts, generator=generator)
            router.bias.add_((std * offsets).to(router.bias))


class ExpertLoads:
    """Counts the tokens that experts get.

    :param model: The model; one without a router has no counts.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers = _list_routers(model)
        self._loads: dict[nn.Module, Tensor] = {}

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what routers do.

        :returns: Until the end of which counts grow.
        """
        handles = [
            router.register_forward_hook(self._count) for router in self._routers
        ]

        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def busiest_share(self) -> float | None:
        """Compute which share of a layer's load its busiest expert gets.

        :returns: The mean over layers of the share of assignments of a token to an
            expert, in [0, 1]; ``None`` if nothing was counted.
        """
        if not self._loads:
            return None

        shares = [loads.max() / loads.sum() for loads in self._loads.values()]

        return float(torch.stack(shares).mean())

    def _count(self, router: nn.Module, _: object, routing: Routing) -> None:
        self._loads[router] = self._loads.get(router, 0) + count_expert_loads(routing)


def _list_routers(model: nn.Module) -> list[Router]:
    return [module for module in model.modules() if isinstance(module, Router)]
