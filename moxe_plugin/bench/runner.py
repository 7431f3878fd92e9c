"""Runs the stages of a suite, each in a process, and continues what is there.

A stage is done when its state says so, and is then never run again. A stage that was
killed is run again in the same directory: training continues from its last checkpoint,
anything else starts over. A stage whose configuration has changed is not continued and
not reused: see :mod:`moxe_plugin.bench.work_dir`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from multiprocessing.context import ForkServerContext
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import NamedTuple

from moxe_plugin.bench.children import (
    ChildFailedError,
    ChildFunction,
    ChildResult,
    run_in_child,
)
from moxe_plugin.bench.display import Display
from moxe_plugin.bench.machine import Jobs
from moxe_plugin.bench.plan import RunPlan, StagePlan
from moxe_plugin.bench.progress import StageProgress, read_progress
from moxe_plugin.bench.recording import find_records, record_run
from moxe_plugin.bench.stage_state import read_state, write_state
from moxe_plugin.bench.work_dir import is_done

_SAVE_ELAPSED_S = 5.0
"""How often the time of a running stage is saved, which a kill would lose."""


class FailedRun(NamedTuple):
    """A run that ended with an error."""

    plan: RunPlan
    stage: StagePlan
    error: ChildFailedError


class Runner:
    """Runs the plans of a suite.

    :param suite_name: The name of the suite.
    :param results_dir: Where records go.
    :param context: Makes the child processes.
    :param functions: The function of each stage.
    :param display: Shows the progress.
    :param jobs: How runs share the machine.
    """

    def __init__(
        self,
        suite_name: str,
        results_dir: Path,
        *,
        context: ForkServerContext,
        functions: Mapping[str, ChildFunction],
        display: Display,
        jobs: Jobs,
    ) -> None:
        self._suite_name = suite_name
        self._results_dir = results_dir
        self._context = context
        self._functions = functions
        self._display = display
        self._jobs = jobs
        self._record_lock = Lock()
        self._is_interrupted = False

        self._devices: SimpleQueue[str | None] = SimpleQueue()
        for device in jobs.devices:
            self._devices.put(device)

    def run(self, plans: Sequence[RunPlan]) -> list[FailedRun]:
        """Run all that is not done yet; a failed run does not stop the others.

        :param plans: The runs.

        :returns: The runs that failed.
        """
        with ThreadPoolExecutor(self._jobs.num_jobs) as executor:
            futures = [executor.submit(self._try_one, plan) for plan in plans]

            try:
                results = [future.result() for future in futures]
            except BaseException:
                # The executor waits for its threads, and they for their processes.
                self._is_interrupted = True
                executor.shutdown(wait=False, cancel_futures=True)

                raise

        return [failed for failed in results if failed is not None]

    def _try_one(self, plan: RunPlan) -> FailedRun | None:
        # There are as many as threads.
        device = self._devices.get()

        try:
            self._run_one(plan, device)
        except _StageFailedError as ex:
            self._display.show(f"{plan.title}: {ex.stage.name} failed. {ex.error}")

            return FailedRun(plan, ex.stage, ex.error)
        finally:
            self._devices.put(device)

        return None

    def _run_one(self, plan: RunPlan, device: str | None) -> None:
        with self._record_lock:
            records = find_records(self._results_dir)

        if (record := records.get(plan.config_sha256)) is not None:
            self._display.skip(plan, plan.stages, f"recorded in {record.name}")

            return

        for stage in plan.stages:
            if is_done(stage):
                self._display.skip(plan, [stage], "done before")
            else:
                self._run_stage(plan, stage, device)

        with self._record_lock:
            record_run(
                plan,
                self._suite_name,
                self._results_dir,
                date.today(),
                self._jobs.num_jobs,
            )

    def _run_stage(self, plan: RunPlan, stage: StagePlan, device: str | None) -> None:
        state = read_state(stage.state_file) or stage.start()
        write_state(stage.state_file, state)

        began = saved = time.monotonic()

        def on_poll() -> None:
            nonlocal saved

            if self._is_interrupted:
                raise _InterruptedError

            now = time.monotonic()
            if now - saved > _SAVE_ELAPSED_S:
                elapsed_s = state.elapsed_s + now - began
                write_state(stage.state_file, replace(state, elapsed_s=elapsed_s))
                saved = now

            step.update(read_progress(stage, log_file))

        log_file = stage.run_dir / f"{stage.name}.log"

        step = self._display.start(plan, stage)

        try:
            output = run_in_child(
                self._context,
                self._functions[stage.name],
                [stage],
                log_file=log_file,
                on_poll=on_poll,
                num_threads=self._jobs.num_threads,
                device=device,
            )
        except ChildFailedError as ex:
            # A terminal interrupts the children too; that is no failure of theirs.
            if self._is_interrupted:
                raise _InterruptedError from ex

            step.finish(None)

            raise _StageFailedError(stage, ex) from ex

        elapsed_s = state.elapsed_s + time.monotonic() - began

        write_state(
            stage.state_file,
            replace(
                state,
                status="done",
                elapsed_s=elapsed_s,
                result={**output.content, "peak_memory_gib": output.peak_memory_gib},
            ),
        )

        step.finish(elapsed_s)


class _InterruptedError(Exception):
    """Ends a thread whose suite was interrupted."""


class _StageFailedError(Exception):
    def __init__(self, stage: StagePlan, error: ChildFailedError) -> None:
        super().__init__(str(error))

        self.stage = stage
        self.error = error


def run_with_progress(
    context: ForkServerContext,
    function: ChildFunction,
    args: Sequence[object],
    *,
    title: str,
    log_file: Path,
    display: Display,
    num_threads: int,
) -> ChildResult:
    """Run a step that belongs to no run in a child process.

    :param context: Makes the child process.
    :param function: The function.
    :param args: Its arguments.
    :param title: What the display calls it.
    :param log_file: Gets what it prints.
    :param display: Shows the progress.
    :param num_threads: The threads of one operation of the process.

    :returns: The result.

    :raises ChildFailedError: It failed.
    """
    step = display.start_step(title)

    began = time.monotonic()

    output = run_in_child(
        context,
        function,
        args,
        log_file=log_file,
        on_poll=lambda: step.update(StageProgress()),
        num_threads=num_threads,
    )

    step.finish(time.monotonic() - began)

    return output
