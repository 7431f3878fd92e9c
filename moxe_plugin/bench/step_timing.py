"""Times a training step of a configuration."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from fairseq2.device import CPU
from fairseq2.gang import create_fake_gangs
from fairseq2.models import ModelFamily
from fairseq2.nn import BatchLayout
from fairseq2.runtime.dependency import get_dependency_resolver
from fairseq2.utils.config import StandardConfigMerger
from fairseq2.utils.structured import StandardValueConverter

from moxe_plugin.bench.estimate import StepCost
from moxe_plugin.models.clm import LossTerms
from moxe_plugin.models.flops import forward_flops_per_token


def time_step(config: Mapping[str, Any]) -> StepCost:
    """Time a step of pretraining.

    :param config: The resolved configuration of a pretraining.

    :returns: What the step costs.
    """
    section, seq_len = config["model"], config["dataset"]["seq_len"]

    family = get_dependency_resolver().resolve(ModelFamily, key=section["family"])
    model_config = _configure(family, section)

    model: Any = family.create_new_model(
        model_config,
        create_fake_gangs(CPU),
        torch.float32,
        meta=False,
        init_rank0_only=False,
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).train()

    shape = (config["dataset"]["batch_size"], seq_len)
    tokens = torch.randint(2, model_config.vocab_size, shape, device=device)

    for _ in range(2):
        model.zero_grad()
        began = time.monotonic()

        loss: LossTerms = model(
            tokens, BatchLayout.of(tokens), targets=tokens, return_terms=True
        )
        loss.aggregate.backward()

        if device.type == "cuda":
            torch.cuda.synchronize()

        elapsed_s = time.monotonic() - began

    return StepCost(
        forward_flops_per_token(model_config, seq_len), tokens.numel() / elapsed_s
    )


def _configure(family: ModelFamily, section: Mapping[str, Any]) -> Any:
    config = family.maybe_get_arch_config(section["arch"])

    if (overrides := section["config_overrides"]) is None:
        return config

    # As fairseq2's recipes do; their own function is private.
    converter = StandardValueConverter()
    merged = StandardConfigMerger().merge(converter.unstructure(config), overrides)

    return converter.structure(merged, type(config))
