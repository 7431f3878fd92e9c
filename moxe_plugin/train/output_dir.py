"""Finds the checkpoints of a training run, and protects those of another model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from fairseq2.recipe import RecipeContext
from fairseq2.recipe.error import RecipeError


class TrainedModel(NamedTuple):
    """A checkpoint of a training run."""

    checkpoint_dir: Path
    """The directory with ``model.yaml`` and the ``step_N`` directories."""

    name: str
    """The asset name that fairseq2 gives to the checkpoint."""

    tokenizer: dict[str, Any]
    """The ``tokenizer`` section of the run's configuration."""


def find_trained_model(output_dir: Path, step: int | None) -> TrainedModel:
    """Find a checkpoint in the output directory of a training run.

    :param output_dir: The output directory; if the run used a sweep directory, that
        one or its parent.
    :param step: The step of the checkpoint; ``None`` means the last one.

    :returns: The checkpoint.

    :raises RecipeError: There is no such checkpoint.
    """
    run_dir = _find_run_dir(output_dir)

    checkpoint_dir = run_dir / "checkpoints"

    steps = list_steps(checkpoint_dir)
    if not steps:
        raise RecipeError(
            f"'{run_dir}' has no checkpoint. The training run must have reached its "
            "end or `regime.checkpoint_every_n_steps`."
        )

    if step is None:
        name = "last_checkpoint"
    elif step in steps:
        name = f"checkpoint_step_{step}"
    else:
        known = ", ".join(map(str, steps))
        raise RecipeError(
            f"'{run_dir}' has no checkpoint of step {step}. Its steps: {known}."
        )

    config_file = run_dir / "config.yaml"

    if not config_file.is_file():
        raise RecipeError(
            f"'{config_file}' is missing; it tells the tokenizer of the model."
        )

    with config_file.open(encoding="utf-8") as fp:
        config = yaml.safe_load(fp)

    return TrainedModel(checkpoint_dir.absolute(), name, config["tokenizer"])


def list_steps(checkpoint_dir: Path) -> list[int]:
    """List the steps that have a complete checkpoint.

    :param checkpoint_dir: The directory with the ``step_N`` directories; it need not
        exist.

    :returns: The steps, in order.
    """
    suffixes = [d.name.removeprefix("step_") for d in checkpoint_dir.glob("step_*")]

    # A checkpoint that is being written is called `step_N.tmp`.
    return sorted(int(s) for s in suffixes if s.isdecimal())


@contextmanager
def refuse_other_model(context: RecipeContext) -> Iterator[None]:
    """Refuse to continue a run whose checkpoints are of another model.

    Within the context fairseq2 creates the model and writes ``model.yaml``.

    :param context: The context of the recipe.

    :yields: Nothing.

    :raises RecipeError: The output directory has checkpoints of a model with another
        configuration; ``model.yaml`` is then as it was.
    """
    checkpoint_dir = context.output_dir / "checkpoints"

    file = checkpoint_dir / "model.yaml"

    old = file.read_bytes() if list_steps(checkpoint_dir) and file.exists() else None

    context.gangs.root.barrier()

    yield

    if old is None or old == file.read_bytes():
        return

    context.gangs.root.barrier()

    if context.gangs.root.rank == 0:
        file.write_bytes(old)

    raise RecipeError(
        f"'{context.output_dir}' holds a training run of another model (see "
        "checkpoints/model.yaml). Choose another output directory, or remove this one."
    )


def _find_run_dir(output_dir: Path) -> Path:
    if not output_dir.is_dir():
        raise RecipeError(
            f"'{output_dir}' must be the output directory of a training run or the "
            "name of a model asset, but is neither a directory nor a known asset."
        )

    if output_dir.joinpath("checkpoints", "model.yaml").is_file():
        return output_dir

    run_dirs = sorted(
        f.parents[1] for f in output_dir.glob("ws_*/checkpoints/model.yaml")
    )

    if len(run_dirs) == 1:
        return run_dirs[0]

    if run_dirs:
        names = ", ".join(d.name for d in run_dirs)
        raise RecipeError(
            f"'{output_dir}' holds more than one training run. Name one of its "
            f"sub-directories: {names}."
        )

    raise RecipeError(
        f"'{output_dir}' is not the output directory of a training run: it has no "
        "checkpoints/model.yaml."
    )
