"""What the work directory of a suite holds: stages done, begun, or in conflict."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from moxe_plugin.bench.plan import RunPlan, StagePlan
from moxe_plugin.bench.recording import find_records
from moxe_plugin.bench.stage_state import list_changes, read_state
from moxe_plugin.bench.suite import SuiteError


class Conflict(NamedTuple):
    """A stage that was begun with another configuration."""

    stage: StagePlan
    changes: Sequence[str]
    """As :func:`~moxe_plugin.bench.stage_state.list_changes` lists them; empty if it is
    the data that differs, or an earlier stage."""


def is_done(stage: StagePlan) -> bool:
    """Tell whether a stage was finished with its present configuration.

    :param stage: The stage.

    :returns: Whether it need not run.
    """
    state = read_state(stage.state_file)

    return (
        state is not None
        and state.status == "done"
        and state.config_sha256 == stage.config_sha256
    )


def find_conflicts(plans: Sequence[RunPlan], results_dir: Path) -> list[Conflict]:
    """Find stages that were begun with another configuration.

    :param plans: The runs.
    :param results_dir: Where records are; a recorded run needs no stage any more.

    :returns: The conflicts.
    """
    records = find_records(results_dir)

    return [
        Conflict(stage, list_changes(state.config, stage.config))
        for plan in plans
        if plan.config_sha256 not in records
        for stage in plan.stages
        if (state := read_state(stage.state_file)) is not None
        and state.config_sha256 != stage.config_sha256
    ]


def remove_conflicts(conflicts: Sequence[Conflict]) -> None:
    """Remove stages that were begun with another configuration.

    :param conflicts: As :func:`find_conflicts` returns them.
    """
    for stage, _ in conflicts:
        stage.state_file.unlink()

        if stage.output_dir.exists():
            shutil.rmtree(stage.output_dir)


@contextmanager
def lock_work_dir(work_dir: Path) -> Iterator[None]:
    """Make sure that no other benchmark works in the same directory.

    :param work_dir: The directory.

    :yields: Nothing.

    :raises SuiteError: Another process holds the directory, or it cannot be made.
    """
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
    except OSError as ex:
        raise SuiteError(
            f"`--out` and `--work` must be directories that can be written to, but "
            f"'{work_dir}' cannot be made: {ex.strerror}."
        ) from None

    with (work_dir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SuiteError(
                f"Another `moxe bench` is at work in '{work_dir}'. Wait for it, or "
                "choose another --work."
            ) from None

        yield
