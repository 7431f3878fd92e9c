"""Find the checkpoints in the output directory of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML


class TrainOutput(NamedTuple):
    """One checkpoint of a training run, and what is written beside it."""

    dir: Path
    """The output directory: it holds ``checkpoints`` and ``config.yaml``."""

    step: int
    """The training step of the checkpoint."""

    model_card: Mapping[str, Any]
    """``checkpoints/model.yaml``: family and configuration of the model."""

    recipe_config: Mapping[str, Any]
    """``config.yaml`` of the run; empty if there is none."""

    @property
    def model_dir(self) -> Path:
        """The directory with the parameters."""
        return self.dir / "checkpoints" / f"step_{self.step}" / "model"


def open_train_output(path: Path, step: int | None = None) -> TrainOutput:
    """Find one checkpoint of a training run.

    :param path: The output directory, the directory that holds its single sweep
        directory (``ws_…``), its ``checkpoints``, or a ``step_N`` in there.
    :param step: The training step; the last one by default.

    :returns: The checkpoint.

    :raises ValueError: ``path`` holds no checkpoint, more than one run, or none of the
        asked ``step``.
    """
    path = path.resolve()

    if path.name.startswith("step_") and (path.parent / "model.yaml").is_file():
        path, step_in_path = path.parent, int(path.name.removeprefix("step_"))
        step = step_in_path if step is None else step

    output_dir = _find_output_dir(path)
    steps = list_steps(output_dir)

    if not steps:
        raise ValueError(
            f"`checkpoint` must hold a checkpoint, but '{output_dir}' has none yet."
        )

    if step is None:
        step = steps[-1]
    elif step not in steps:
        raise ValueError(
            f"`step` must be one of {', '.join(map(str, steps))}, but is {step} for "
            f"'{output_dir}'."
        )

    config_file = output_dir / "config.yaml"

    return TrainOutput(
        output_dir,
        step,
        _read_yaml(output_dir / "checkpoints" / "model.yaml"),
        _read_yaml(config_file) if config_file.is_file() else {},
    )


def list_steps(output_dir: Path) -> list[int]:
    """List the training steps that have a complete checkpoint, in order.

    :param output_dir: The output directory of the run.

    :returns: The steps.
    """
    names = (p.parent.name for p in output_dir.glob("checkpoints/step_*/model"))

    # An unfinished checkpoint is called `step_N.tmp`.
    return sorted(
        int(n.removeprefix("step_"))
        for n in names
        if n.removeprefix("step_").isdecimal()
    )


def _find_output_dir(path: Path) -> Path:
    if (path / "checkpoints" / "model.yaml").is_file():
        return path

    if path.name == "checkpoints" and (path / "model.yaml").is_file():
        return path.parent

    runs = sorted(p.parent.parent for p in path.glob("ws_*/checkpoints/model.yaml"))

    if len(runs) == 1:
        return runs[0]

    if runs:
        raise ValueError(
            f"`checkpoint` must hold one training run, but '{path}' holds several. "
            f"Name one of: {', '.join(p.name for p in runs)}."
        )

    raise ValueError(
        f"`checkpoint` must be the output directory of a training run, but '{path}' "
        "has no `checkpoints/model.yaml`."
    )


def _read_yaml(file: Path) -> Mapping[str, Any]:
    # As fairseq2 writes it: YAML 1.2, in which 1e-05 is a number.
    content = YAML(typ="safe", pure=True).load(file)

    if not isinstance(content, dict):
        raise ValueError(f"'{file}' must hold a YAML mapping.")

    return content
