"""What a child process of a suite does; torch is imported in here only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from moxe_plugin.bench.commands import RECIPES
from moxe_plugin.bench.plan import StagePlan, run_key
from moxe_plugin.bench.suite import Suite, SuiteError
from moxe_plugin.train.registry import UnknownNameError

PRELOAD: Final = (
    "torch",
    "transformers",
    "fairseq2",
    "fairseq2.recipe.cli",
    "lm_eval.evaluator",
    "moxe_plugin.composition",
    "moxe_plugin.train.launch",
    "moxe_plugin.train.pretrain",
    "moxe_plugin.train.instruction_finetune",
    "moxe_plugin.eval.evaluation",
    "moxe_plugin.bench.corpus",
    "moxe_plugin.bench.resolution",
    "moxe_plugin.bench.scoring",
    "moxe_plugin.bench.stages",
)
"""What the server of child processes imports."""


def build_data(suite: Suite, work_dir: Path) -> dict[str, Any]:
    """Build the data that a suite describes itself, if it is missing.

    :param suite: The suite.
    :param work_dir: Where work is done.

    :returns: Options of all systems: ``pretrain_config`` and ``finetune_config``; or
        ``error``: what the user did wrong.
    """
    from moxe_plugin.bench import corpus

    try:
        return corpus.build_data(suite, work_dir)
    except SuiteError as ex:
        return {"error": str(ex)}


def resolve_suite(suite: Suite) -> dict[str, Any]:
    """Find out what the presets, the data and the tasks of a suite are.

    :param suite: The suite.

    :returns: The fields of :class:`~moxe_plugin.bench.plan.Resolution`, or ``error``:
        what the user did wrong.
    """
    try:
        return _resolve(suite)
    except (SuiteError, UnknownNameError) as ex:
        return {"error": str(ex)}


def _resolve(suite: Suite) -> dict[str, Any]:
    from moxe_plugin.bench.resolution import (
        check_instructions,
        describe_data,
        resolve_preset,
        resolve_tasks,
    )

    tasks = resolve_tasks(suite.tasks)

    configs: dict[str, dict[str, Any]] = {}
    data: dict[str, Any] = {}

    for seed in suite.seeds:
        for system in suite.systems:
            key = run_key(system, seed)

            overrides = {**suite.pretrain_config, **system.pretrain_config}
            configs[key] = {
                "pretrain": resolve_preset(
                    RECIPES["pretrain"], system.pretrain, seed, overrides
                )
            }

            if system.finetune is not None:
                overrides = {**suite.finetune_config, **system.finetune_config}
                configs[key]["finetune"] = resolve_preset(
                    RECIPES["finetune"], system.finetune, seed, overrides
                )
                check_instructions(system.finetune, configs[key]["finetune"])

            data[key] = describe_data(suite.data, configs[key])

    return {"configs": configs, "data": data, "tasks": tasks}


def train(stage: StagePlan) -> dict[str, Any]:
    """Run or continue a training stage, as its command does.

    The configuration is the one that was resolved when the suite began: a preset may
    be edited while the suite runs.

    :param stage: The stage.

    :returns: The device and the number of threads.
    """
    from moxe_plugin.train.launch import launch
    from moxe_plugin.train.registry import get_recipe_entry

    # The parent shows progress from the metrics.
    os.environ["FAIRSEQ2_NO_PROGRESS"] = "1"

    config = dict(stage.config)
    if stage.name == "finetune":
        source = str(stage.run_dir / "pretrain")
        config["pretrained"] = {**config["pretrained"], "source": source}

    recipe = get_recipe_entry(RECIPES[stage.name]).load()

    launch(recipe, config, [str(stage.output_dir), "--no-rich"])

    return _describe_device()


def evaluate(stage: StagePlan) -> dict[str, Any]:
    """Evaluate the checkpoints of a run.

    :param stage: The stage.

    :returns: Files of the record by name, and facts about the model.
    """
    from moxe_plugin.bench.scoring import evaluate_run

    return evaluate_run(stage)


def guess(stage: StagePlan) -> dict[str, Any]:
    """Evaluate a guess that no model is needed for.

    :param stage: The stage.

    :returns: Files of the record by name, the device and the number of threads.
    """
    from moxe_plugin.bench.guesses import evaluate_guess

    return {**evaluate_guess(stage), **_describe_device()}


def measure_steps(stages: Mapping[str, StagePlan]) -> dict[str, Any]:
    """Measure a training step of each of some stages.

    :param stages: The stages by a key.

    :returns: ``steps``: fields of :class:`~moxe_plugin.bench.estimate.StepCost` by key;
        the device and the number of threads.
    """
    from moxe_plugin.bench.step_timing import time_step

    steps = {key: time_step(stage.config)._asdict() for key, stage in stages.items()}

    return {"steps": steps, **_describe_device()}


def _describe_device() -> dict[str, Any]:
    import torch

    is_cuda = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0

    return {
        "device": "cuda" if is_cuda else "cpu",
        "device_name": torch.cuda.get_device_name() if is_cuda else None,
        "num_threads": torch.get_num_threads(),
    }


STAGE_FUNCTIONS: Final[Mapping[str, Any]] = {
    "pretrain": train,
    "finetune": train,
    "evaluate": evaluate,
    "guess": guess,
}
"""The function of each stage."""
