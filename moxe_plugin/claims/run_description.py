"""What a run's output says of its model and its training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq2.models import ModelFamily
from fairseq2.models.clm import CausalLM
from fairseq2.runtime.dependency import get_dependency_resolver
from fairseq2.utils.structured import StandardValueConverter

from moxe_plugin.bench.metrics import read_train_metrics
from moxe_plugin.claims.tracing import count_mlstm_experts
from moxe_plugin.models.clm import AuxLossCausalLM
from moxe_plugin.models.flops import forward_flops_per_token
from moxe_plugin.models.train_output import TrainOutput


def describe_model(output: TrainOutput, model: CausalLM) -> dict[str, Any]:
    """Describe the model of a run.

    :param output: The run.
    :param model: Its model.

    :returns: The content of
        :attr:`~moxe_plugin.claims.measurements.RunMeasurement.model`.
    """
    assert isinstance(model, AuxLossCausalLM)

    num_parameters = sum(p.numel() for p in model.parameters())

    return {
        "family": output.model_card["model_family"],
        "config": dict(output.model_card["model_config"]),
        "num_parameters": num_parameters,
        "num_active_parameters": round(num_parameters - model.num_idle_parameters()),
        "forward_flops_per_token": _count_flops(output),
        "num_mlstm_experts": count_mlstm_experts(model),
    }


def _count_flops(output: TrainOutput) -> int:
    card = output.model_card

    family = get_dependency_resolver().resolve(ModelFamily, key=card["model_family"])
    config = StandardValueConverter().structure(card["model_config"], family.config_kls)

    window_len = int(output.recipe_config["dataset"]["seq_len"])

    return forward_flops_per_token(config, window_len)


def read_training(output_dir: Path) -> dict[str, Sequence[float]]:
    """Read what a run published while it trained.

    :param output_dir: The output directory of the run.

    :returns: By published step: tokens so far, the loss, and of each layer with a
        router the mLSTM group's share of places and the router's entropy.
    """
    lines = read_train_metrics(output_dir, "")

    names = [
        name
        for name in lines[0]
        if name == "NLL Loss" or name.endswith(("/mlstm_share", "/router_entropy"))
    ]

    return {
        "tokens": [line["Total Number of Target Elements"] for line in lines],
        **{name: [line[name] for line in lines] for name in names},
    }
