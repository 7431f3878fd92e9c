"""Refuses to continue a run whose files would run code when fairseq2 opens them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fairseq2.checkpoint import CheckpointDir
from fairseq2.logging import log
from fairseq2.recipe import RecipeContext
from fairseq2.recipe.cli import register_cli_error
from fairseq2.recipe.config import CommonSection
from fairseq2.recipe.error import RecipeError
from fairseq2.runtime.dependency import DependencyContainer

from moxe_plugin.models.pickle_scan import (
    UnsafeCheckpointError,
    check_safe_to_unpickle,
)
from moxe_plugin.models.train_output import read_model_card

# Not `model`: fairseq2 reads that one without running anything.
_UNRESTRICTED: Final = (
    "trainer/*.pt",
    "optimizer/*/*/*.pt",
    "data_reader/*.pt",
)


def register_unsafe_checkpoint_error(container: DependencyContainer) -> None:
    """Let the command line tell of an unsafe checkpoint in one line, with exit code 1.

    :param container: fairseq2's dependency container.
    """
    register_cli_error(container, UnsafeCheckpointError, _report)


def _report(ex: UnsafeCheckpointError) -> int:
    log.error("{}", ex)

    return 1


def check_resumed_checkpoint(context: RecipeContext) -> None:
    """Examine the files of the checkpoint from which a run will continue.

    :param context: The context of the recipe.

    :raises UnsafeCheckpointError: One would run code.
    """
    step_nr = context.get_checkpoint_manager().maybe_get_last_step_number(
        exclude_model_only=True
    )

    if step_nr is None:
        return

    checkpoint_dir = context.resolver.resolve(CheckpointDir).path

    if checkpoint_dir is None:
        checkpoint_dir = context.output_dir / "checkpoints"

    for file in list_unrestricted_files(checkpoint_dir / f"step_{step_nr}"):
        check_safe_to_unpickle(file)


def list_unrestricted_files(step_dir: Path) -> Iterator[Path]:
    """List the files of a checkpoint that fairseq2 opens without restriction.

    :param step_dir: The directory ``step_N``.

    :yields: The files.
    """
    for pattern in _UNRESTRICTED:
        yield from sorted(step_dir.glob(pattern))


def check_named_checkpoints(common: CommonSection) -> None:
    """Examine what a user names as ``common.assets.prev_checkpoint_dir``.

    :param common: The section of the configuration.

    :raises RecipeError: Its ``model.yaml`` is damaged or would let it run code.
    """
    directory = common.assets.prev_checkpoint_dir

    if directory is None or not (directory / "model.yaml").is_file():
        return

    try:
        read_model_card(directory / "model.yaml")
    except ValueError as ex:
        # With a cause, fairseq2 logs a stack trace.
        raise RecipeError(str(ex)) from None
