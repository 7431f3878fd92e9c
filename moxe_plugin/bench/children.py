"""Child processes: one for each stage, forked from a server that has imported torch.

A stage in a process of its own has a peak memory of its own, and its crash loses
nothing else. The server (:mod:`multiprocessing`'s ``forkserver``) imports the heavy
libraries once and never computes, so it has no thread pool that a fork could break:
OpenMP, MKL and torch start theirs in the child.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Final, NamedTuple

from moxe_plugin.report.files import write_json

ChildFunction = Callable[..., dict[str, Any]]
"""A function of a module, which returns JSON values."""

_POLL_S: Final = 0.5
_MAX_ERROR_LINES: Final = 15

_LOCK: Final = threading.Lock()


class ChildFailedError(Exception):
    """Raised when a child process did not finish.

    :param exit_code: Its exit code; negative for a signal.
    :param log_file: What it printed.
    """

    def __init__(self, exit_code: int, log_file: Path) -> None:
        if exit_code < 0:
            cause = f"was killed by signal {-exit_code}"
        else:
            cause = f"ended with exit code {exit_code}"

        super().__init__(f"The process {cause}; see '{log_file}'.")

        self.exit_code = exit_code
        self.log_file = log_file

    def read_log_tail(self) -> str:
        """Read the end of what the process printed.

        :returns: The last lines.
        """
        text = self.log_file.read_text(encoding="utf-8", errors="replace")

        return "\n".join(text.splitlines()[-_MAX_ERROR_LINES:])


class ChildResult(NamedTuple):
    """What a child process left behind."""

    content: dict[str, Any]
    """What its function returned."""

    peak_memory_gib: float
    """Peak resident memory of the process, or peak memory of tensors on an accelerator
    if it used one."""


def create_context(preload: Sequence[str]) -> ForkServerContext:
    """Create the context of child processes; the server starts with the first one.

    :param preload: The modules that the server imports.

    :returns: The context.
    """
    context = multiprocessing.get_context("forkserver")

    context.set_forkserver_preload(list(preload))

    return context


def run_in_child(
    context: ForkServerContext,
    function: ChildFunction,
    args: Sequence[Any],
    *,
    log_file: Path,
    on_poll: Callable[[], None],
    num_threads: int,
    device: str | None = None,
) -> ChildResult:
    """Run a function in a process of its own and wait for it.

    May be called from several threads at a time.

    :param context: Made by :func:`create_context`.
    :param function: The function.
    :param args: Its arguments, picklable.
    :param log_file: Gets what the process prints, after what is there already.
    :param on_poll: Called about twice a second while the process runs; what it raises
        ends the process.
    :param num_threads: The threads of one operation of the process.
    :param device: What ``CUDA_VISIBLE_DEVICES`` is in the process; ``None`` leaves it.

    :returns: The result.

    :raises ChildFailedError: The process ended with an error or was killed.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)

    result_file = log_file.with_suffix(".result")
    result_file.unlink(missing_ok=True)
    # A process that dies before it prints anything has a log all the same.
    log_file.touch()

    process = context.Process(
        target=_run,
        args=(function, tuple(args), log_file, result_file, num_threads, device),
    )

    # Starting a process also looks which others have ended, and an end can be seen
    # once only: hence the lock around both.
    with _LOCK:
        process.start()

    try:
        while not wait([process.sentinel], _POLL_S):
            on_poll()
    finally:
        # Reached early when the user interrupts.
        with _LOCK:
            # The id of a process that has ended may be another's by now.
            if process.is_alive():
                process.terminate()
            process.join()

    exit_code = process.exitcode
    if exit_code != 0 or not result_file.exists():
        raise ChildFailedError(exit_code or 0, log_file)

    # Not strict: a NaN loss is for the tables to report.
    output = json.loads(result_file.read_text(encoding="utf-8"))
    result_file.unlink()

    return ChildResult(output["content"], output["peak_memory_gib"])


def _run(
    function: ChildFunction,
    args: tuple[Any, ...],
    log_file: Path,
    result_file: Path,
    num_threads: int,
    device: str | None,
) -> None:
    _end_with_parent()

    # In time: CUDA reads it when it is first used, and the server never uses it.
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device

    # fairseq2 leaves the number of threads alone if this is set; torch, imported by the
    # server, does not read it any more.
    os.environ["OMP_NUM_THREADS"] = str(num_threads)

    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(num_threads)

    with log_file.open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)

    content = function(*args)

    write_json(
        result_file, {"content": content, "peak_memory_gib": _read_peak_memory_gib()}
    )


def _end_with_parent() -> None:
    # Otherwise a killed benchmark leaves a child that writes on beside the next one.
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _read_peak_memory_gib() -> float:
    torch = sys.modules.get("torch")

    if torch is not None and torch.cuda.is_available():
        peak_bytes = torch.cuda.max_memory_allocated()
        if peak_bytes > 0:
            return float(peak_bytes / 2**30)

    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
