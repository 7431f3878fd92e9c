"""Finds the finished training runs below directories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from moxe_plugin.claims.systems import name_system
from moxe_plugin.models.train_output import TrainOutput, list_steps, open_train_output


class FoundRuns(NamedTuple):
    """What a search found."""

    finished: Sequence[TrainOutput]
    unfinished: Sequence[str]
    """Of each run that has not reached its last step: its directory, and how far."""


def find_runs(directories: Sequence[Path]) -> FoundRuns:
    """Find training outputs.

    Directories named ``finetune`` are left out: ``moxe bench`` puts a run's finetuning
    beside its pretraining.

    :param directories: Training outputs, or directories that hold some, such as the
        work directory of a suite.

    :returns: The runs, sorted by directory.

    :raises ValueError: There is no run below a directory, or two runs are of the same
        system and seed.
    """
    outputs: set[Path] = set()

    for directory in directories:
        found = {
            file.parents[1].resolve()
            for file in directory.glob("**/checkpoints/model.yaml")
            if file.parents[1].name != "finetune"
        }
        if not found:
            raise ValueError(
                f"`{directory}` is no training output and holds none: there is no "
                "`checkpoints/model.yaml` below it."
            )
        outputs |= found

    finished, unfinished = [], []

    for output_dir in sorted(outputs):
        if not list_steps(output_dir):
            unfinished.append(f"{output_dir}: no checkpoint yet")
            continue

        output = open_train_output(output_dir)
        num_steps = output.recipe_config["regime"]["num_steps"]

        if num_steps is not None and output.step < num_steps:
            unfinished.append(f"{output_dir}: step {output.step} of {num_steps}")
        else:
            finished.append(output)

    _check_unique(finished)

    return FoundRuns(finished, unfinished)


def identify(output: TrainOutput) -> tuple[str, int]:
    """Tell which system and seed a run is of.

    :param output: The run.

    :returns: The system's name, and the seed.
    """
    card = output.model_card

    return (
        name_system(card["model_family"], card["model_config"]),
        int(output.recipe_config["common"]["seed"]),
    )


def _check_unique(outputs: Sequence[TrainOutput]) -> None:
    seen: dict[tuple[str, int], TrainOutput] = {}

    for output in outputs:
        system, seed = identify(output)
        other = seen.setdefault((system, seed), output)

        if other is not output:
            raise ValueError(
                f"`{other.dir}` and `{output.dir}` are both of system {system} with "
                f"seed {seed}. Name one of them."
            )
