"""Tells fairseq2 how our own errors end a run: a line in the log, an exit code."""

from __future__ import annotations

from fairseq2.logging import log
from fairseq2.recipe import register_cli_error
from fairseq2.runtime.dependency import DependencyContainer

from moxe_plugin.models.checkpoint_files import DamagedCheckpointError
from moxe_plugin.train.finite import NonFiniteLossError


def register_errors(container: DependencyContainer) -> None:
    """Register the errors that a recipe may end with.

    :param container: The container of the recipe.
    """
    register_cli_error(container, DamagedCheckpointError, _report_damage)
    register_cli_error(container, NonFiniteLossError, _report_non_finite_loss)


def _report_damage(ex: DamagedCheckpointError) -> int:
    log.error("{}", ex)

    return 1


def _report_non_finite_loss(ex: NonFiniteLossError) -> int:
    log.error("{}", ex)

    return 3
