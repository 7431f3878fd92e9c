"""Finds the checkpoints in the output directory of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from moxe_plugin.models.checkpoint_files import (
    MODEL_CARD_COPY,
    MODEL_STATE,
    DamagedCheckpointError,
    find_damage,
    find_whole_step,
)
from moxe_plugin.models.model_card import check_model_card


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
    def checkpoint_dir(self) -> Path:
        """The directory with ``model.yaml`` and the ``step_N`` directories."""
        return self.dir / "checkpoints"

    @property
    def model_dir(self) -> Path:
        """The directory with the parameters."""
        return self.checkpoint_dir / f"step_{self.step}" / "model"


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

    step_in_path = path.name.removeprefix("step_")

    if (path.parent / "model.yaml").is_file() and step_in_path.isdecimal():
        if step not in (None, int(step_in_path)):
            raise ValueError(
                f"`step` must be left out or be that of '{path}', but is {step} "
                "instead."
            )

        path, step = path.parent, int(step_in_path)

    output_dir = _find_output_dir(path)
    steps = list_steps(output_dir)

    if not steps:
        raise ValueError(
            f"'{output_dir}' has no checkpoint. The training run must have reached its "
            "end or `regime.checkpoint_every_n_steps`."
        )

    if step is None:
        step = steps[-1]
    elif step not in steps:
        raise ValueError(
            f"'{output_dir}' has no checkpoint of step {step}. Its steps: "
            f"{', '.join(map(str, steps))}."
        )

    config_file = output_dir / "config.yaml"

    return TrainOutput(
        output_dir,
        step,
        read_model_card(output_dir / "checkpoints" / "model.yaml"),
        _read_yaml(config_file) if config_file.is_file() else {},
    )


def read_model_card(file: Path) -> Mapping[str, Any]:
    """Read what a training run says of its model.

    :param file: Its ``model.yaml``.

    :returns: The content.

    :raises ValueError: It is damaged, or would let a checkpoint run code.
    """
    card = _read_yaml(file)

    check_model_card(card, file)

    return card


def check_model(output: TrainOutput) -> None:
    """Make sure that the model of a checkpoint is as it was written.

    Reads its files once.

    :param output: The checkpoint.

    :raises DamagedCheckpointError: A file is not; the message says which, and what
        other checkpoint is whole.
    """
    card_file = output.checkpoint_dir / "model.yaml"
    card_copy = output.checkpoint_dir / f"step_{output.step}" / MODEL_CARD_COPY

    if card_copy.is_file() and card_copy.read_bytes() != card_file.read_bytes():
        raise DamagedCheckpointError(
            f"'{card_file}' is damaged: it is not what step {output.step} was saved "
            f"with. Copy '{card_copy}' over it."
        )

    step_dir = output.checkpoint_dir / f"step_{output.step}"

    damage = find_damage(step_dir, MODEL_STATE)
    if damage is None:
        return

    steps = list_steps(output.dir)
    later = [s for s in reversed(steps) if s > output.step]
    earlier = [s for s in steps if s < output.step]

    whole = find_whole_step(output.checkpoint_dir, [*later, *earlier], MODEL_STATE)

    if whole is None:
        way_out = "No other checkpoint of this training is whole: restore the file from"
        way_out += " a copy, or train again."
    else:
        way_out = f"The checkpoint of step {whole} is whole: set `step` to {whole}."

    raise DamagedCheckpointError(f"'{damage.path}' {damage.reason}. {way_out}")


def list_steps(output_dir: Path) -> list[int]:
    """List the training steps that have a complete checkpoint, in order.

    :param output_dir: The output directory of the run; it need not exist.

    :returns: The steps.
    """
    names = (p.parent.name for p in output_dir.glob("checkpoints/step_*/model"))

    suffixes = [n.removeprefix("step_") for n in names]

    # A checkpoint that is being written is called `step_N.tmp`.
    return sorted(int(s) for s in suffixes if s.isdecimal())


def _find_output_dir(path: Path) -> Path:
    if (path / "checkpoints" / "model.yaml").is_file():
        return path

    if path.name == "checkpoints" and (path / "model.yaml").is_file():
        return path.parent

    runs = sorted(p.parents[1] for p in path.glob("ws_*/checkpoints/model.yaml"))

    if len(runs) == 1:
        return runs[0]

    if runs:
        raise ValueError(
            f"'{path}' holds more than one training run. Name one of its "
            f"sub-directories: {', '.join(p.name for p in runs)}."
        )

    raise ValueError(
        f"'{path}' is not the output directory of a training run: it has no "
        "checkpoints/model.yaml."
    )


def _read_yaml(file: Path) -> Mapping[str, Any]:
    try:
        # As fairseq2 writes it: YAML 1.2, in which 1e-05 is a number.
        content = YAML(typ="safe", pure=True).load(file)
    except YAMLError as ex:
        raise DamagedCheckpointError(
            f"'{file}' is not valid YAML: {ex}. {_REWRITE}"
        ) from ex

    if not isinstance(content, dict):
        raise DamagedCheckpointError(f"'{file}' must hold a YAML mapping. {_REWRITE}")

    return content


_REWRITE: Final = "The command of the training writes it anew when it is run again."
