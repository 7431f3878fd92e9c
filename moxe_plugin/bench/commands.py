"""The ``fairseq2`` commands that train a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from moxe_plugin.bench.suite import Suite, System

StageName = Literal["pretrain", "finetune", "evaluate", "guess"]

RECIPES: Final[Mapping[StageName, str]] = {
    "pretrain": "lm/pretrain",
    "finetune": "lm/instruction_finetune",
}
"""The recipe of each training stage."""


def train_argv(
    suite: Suite,
    system: System,
    seed: int,
    stage: StageName,
    run_dir: Path,
    config: Mapping[str, Any],
) -> list[str]:
    """Write down the ``fairseq2`` command of a training stage.

    :param suite: The suite.
    :param system: The system.
    :param seed: The seed.
    :param stage: ``pretrain`` or ``finetune``.
    :param run_dir: Where the run's work lies.
    :param config: The resolved configuration of the stage.

    :returns: The arguments after ``fairseq2``.
    """
    options: dict[str, Any] = {"common.seed": seed, "common.no_sweep_dir": True}

    if stage == "pretrain":
        preset = system.pretrain
        options |= {**suite.pretrain_config, **system.pretrain_config}
        extra = []
    else:
        assert system.finetune is not None

        preset = system.finetune
        options |= {**suite.finetune_config, **system.finetune_config}
        extra = ["--from", str(run_dir / "pretrain")]

    return [
        *RECIPES[stage].split("/"),
        str(run_dir / stage),
        "--preset",
        preset,
        *extra,
        "--no-rich",
        "--config",
        # JSON is YAML.
        *(
            f"{name}={json.dumps(_expand(name, value, config))}"
            for name, value in options.items()
        ),
    ]


def _expand(name: str, value: Any, config: Mapping[str, Any]) -> Any:
    # fairseq2 replaces `${env:NAME}` in files, not on the command line.
    if not isinstance(value, str) or "${" not in value:
        return value

    resolved: Any = config
    for key in name.split("."):
        resolved = resolved[key]

    return resolved
