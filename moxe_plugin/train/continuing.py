"""Guards what a training leaves behind, so that it continues from exactly there.

fairseq2 writes a checkpoint into ``step_N.tmp`` and renames it when all of it is there:
whenever a process is killed, ``step_N`` is whole or absent. This module looks after the
rest: files whose content has changed since; ``model.yaml``, which fairseq2 writes anew
at each start and in place; metric files, whose last line a kill cuts off; and the
validation after step N, which fairseq2 does not repeat when it continues from there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fairseq2.checkpoint import CheckpointManager
from fairseq2.gang import Gang, all_sum
from fairseq2.recipe import RecipeContext
from fairseq2.recipe.error import RecipeError

from moxe_plugin.models.checkpoint_files import (
    MODEL_CARD_COPY,
    TRAINING_STATE,
    Damage,
    DamagedCheckpointError,
    find_damage,
    find_whole_step,
)


class CommitGate:
    """Keeps a checkpoint unfinished until the validation of its step is recorded.

    fairseq2's validator finishes the checkpoint that is being written as soon as it
    can. A run that is killed after that would continue behind the validation: its
    metrics and its score would be missing for good, at the last step too.

    :param manager: Writes the checkpoints of the run.
    """

    def __init__(self, manager: CheckpointManager) -> None:
        self._is_closed = False

        complete = manager.maybe_complete_save_operation

        def complete_if_open(*, blocking: bool = False) -> bool | None:
            # Alike on all processes, which would otherwise wait for each other.
            if self._is_closed and not blocking:
                return False

            return complete(blocking=blocking)

        # No hook is exposed, and the manager itself cannot be exchanged.
        manager.maybe_complete_save_operation = complete_if_open  # type: ignore[method-assign]

    def close(self) -> None:
        """Hold back: a validation begins."""
        self._is_closed = True

    def open(self) -> None:
        """Let pass: a training step begins, so what was before is recorded."""
        self._is_closed = False


def list_resumable_steps(output_dir: Path) -> list[int]:
    """List the steps that fairseq2 may continue from, in order.

    :param output_dir: The output directory of the run; it need not exist.

    :returns: The steps.
    """
    # As fairseq2 does: a checkpoint of the model only has no `trainer`.
    names = (p.parent.name for p in output_dir.glob("checkpoints/step_*/trainer"))

    suffixes = [n.removeprefix("step_") for n in names]

    return sorted(int(s) for s in suffixes if s.isdecimal())


def prepare_continuation(output_dir: Path, gang: Gang) -> int | None:
    """Make an output directory ready for a run that starts or continues.

    :param output_dir: The output directory.
    :param gang: All processes of the run; each reads a part of the checkpoint.

    :returns: The step that the run continues from, if it does.

    :raises DamagedCheckpointError: The last checkpoint is not as it was written; on all
        processes.
    :raises RecipeError: fairseq2 would not find the checkpoints in the directory.
    """
    if any(c in str(output_dir) for c in "*?["):
        raise RecipeError(
            "The path of the output directory must not contain `*`, `?` or `[`, but is "
            f"'{output_dir}': fairseq2 would take them for a pattern, not find the "
            "checkpoints, and begin anew each time."
        )

    if gang.rank == 0:
        _drop_unfinished_lines(output_dir / "metrics")

    steps = list_resumable_steps(output_dir)
    if not steps:
        return None

    *earlier, last = steps

    checkpoint_dir = output_dir / "checkpoints"

    damage = find_damage(
        checkpoint_dir / f"step_{last}",
        TRAINING_STATE,
        part=gang.rank,
        num_parts=gang.size,
    )

    if damage is not None:
        all_sum(gang, 1)

        raise DamagedCheckpointError(_describe(damage, checkpoint_dir, last, earlier))

    if all_sum(gang, 0) > 0:
        raise DamagedCheckpointError(
            f"Training cannot continue from step {last}: another process found its "
            f"checkpoint damaged, and says how in '{output_dir / 'logs'}'."
        )

    return last


@contextmanager
def refuse_other_model(context: RecipeContext) -> Iterator[None]:
    """Refuse to continue a run whose checkpoints are of another model.

    Within the context fairseq2 creates the model and writes ``model.yaml``, which may
    have been damaged before: the checkpoint has a copy.

    :param context: The context of the recipe.

    :yields: Nothing.

    :raises RecipeError: The output directory has checkpoints of a model with another
        configuration; ``model.yaml`` is then that of the checkpoints.
    """
    gang = context.gangs.root

    file = context.output_dir / "checkpoints" / "model.yaml"

    old = _read_model_card(context.output_dir)

    gang.barrier()

    yield

    if old is None:
        return

    if old == file.read_bytes():
        if gang.rank == 0:
            # A kill may have come before its copy.
            keep_model_card(
                context.output_dir, list_resumable_steps(context.output_dir)[-1]
            )

        return

    gang.barrier()

    if gang.rank == 0:
        _replace(file, old)

    raise RecipeError(
        f"'{context.output_dir}' holds a training run of another model (see "
        "checkpoints/model.yaml). Choose another output directory, or remove this one."
    )


def keep_model_card(output_dir: Path, step: int) -> None:
    """Put a copy of ``model.yaml`` into a checkpoint that has been written.

    :param output_dir: The output directory of the run.
    :param step: The step of the checkpoint.
    """
    checkpoint_dir = output_dir / "checkpoints"

    copy = checkpoint_dir / f"step_{step}" / MODEL_CARD_COPY
    copy.parent.mkdir(exist_ok=True)

    _replace(copy, (checkpoint_dir / "model.yaml").read_bytes())


def _describe(
    damage: Damage, checkpoint_dir: Path, step: int, earlier: list[int]
) -> str:
    step_dir = checkpoint_dir / f"step_{step}"

    whole = find_whole_step(checkpoint_dir, earlier, TRAINING_STATE)

    problem = (
        f"Training cannot continue from step {step}: '{damage.path}' {damage.reason}."
    )

    if whole is None:
        return (
            f"{problem} No earlier checkpoint is whole: restore the file from a copy, "
            f"or remove '{checkpoint_dir.parent}' to begin anew."
        )

    later = [s for s in earlier if s > whole]
    others = "".join(f", '{checkpoint_dir / f'step_{s}'}'" for s in later)

    return (
        f"{problem} Restore the file from a copy, or remove '{step_dir}'{others}: the "
        f"same command then continues from step {whole}, whose checkpoint is whole."
    )


def _read_model_card(output_dir: Path) -> bytes | None:
    steps = list_resumable_steps(output_dir)
    if not steps:
        return None

    checkpoint_dir = output_dir / "checkpoints"

    for name in (f"step_{steps[-1]}/{MODEL_CARD_COPY}", "model.yaml"):
        # An empty file is one that a kill left when it was written anew.
        if (file := checkpoint_dir / name).is_file() and (card := file.read_bytes()):
            return card

    return None


def _drop_unfinished_lines(metrics_dir: Path) -> None:
    for file in metrics_dir.rglob("*.jsonl"):
        content = file.read_bytes()

        length = content.rfind(b"\n") + 1

        if length < len(content):
            os.truncate(file, length)


def _replace(file: Path, content: bytes) -> None:
    part = file.with_name(file.name + ".part")
    part.write_bytes(content)

    part.replace(file)
