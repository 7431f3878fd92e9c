"""Measure what a system costs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from fairseq2.device import CPU
from fairseq2.gang import create_fake_gangs
from fairseq2.models import ModelFamily
from fairseq2.runtime.dependency import get_dependency_resolver

from moxe_plugin.models.clm import AuxLossCausalLM
from moxe_plugin.models.flops import forward_flops_per_token
from moxe_plugin.systems.catalogue import System
from moxe_plugin.systems.effective import count_effective_parameters


class SystemCost(NamedTuple):
    """What a system costs."""

    system: System
    """The system."""

    num_parameters: int
    """All parameters."""

    num_active_parameters: int
    """Those that take part in a token's matrix products, on average."""

    num_effective_parameters: int
    """Those that can receive a gradient at all."""

    flops_per_token: int
    """Useful FLOPs of a token's forward pass."""


def measure_system(system: System, context_len: int, *, seed: int = 1) -> SystemCost:
    """Create a model of a system on the CPU and measure it.

    :param system: The system.
    :param context_len: The length of the sequence for the FLOPs.
    :param seed: Seeds the parameters and the tokens of the backward passes.

    :returns: What it costs.

    :raises ValueError: The system's architecture is not registered.
    """
    family = get_dependency_resolver().resolve(ModelFamily, key=system.family)

    config = family.maybe_get_arch_config(system.arch)
    if config is None:
        raise ValueError(
            f"`system` must be a registered architecture, but '{system.family}' has "
            f"no '{system.arch}'."
        )

    torch.manual_seed(seed)

    model = family.create_new_model(
        config,
        create_fake_gangs(CPU),
        torch.float64,
        meta=False,
        init_rank0_only=False,
    )
    assert isinstance(model, AuxLossCausalLM)

    num_parameters = sum(p.numel() for p in model.parameters())

    return SystemCost(
        system,
        num_parameters,
        round(num_parameters - model.num_idle_parameters()),
        count_effective_parameters(model),
        forward_flops_per_token(config, context_len),
    )
