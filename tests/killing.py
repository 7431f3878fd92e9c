"""Kills child processes, as ``kill -9`` does, at points that a test chooses."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Final

Fault = Callable[[], None]
"""Prepares a child process to kill itself at some point."""

_FILE_OPERATIONS: Final = (
    "open",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.truncate",
)
"""Events of :func:`sys.audit`, which happen before the operation does."""


def die() -> None:
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_killed(
    function: Callable[[], object],
    fault: Fault | None = None,
    *,
    after_s: float | None = None,
    log_file: Path,
) -> bool:
    """Run a function in a forked process, which has all that is imported here.

    :param function: The function.
    :param fault: Called in the process before the function.
    :param after_s: Kills the process from outside when it has lived so long.
    :param log_file: Gets what the process prints.

    :returns: Whether it was killed; ``False`` if the function returned before.
    """
    pid = os.fork()

    if pid == 0:
        _run(function, fault, log_file)

    if after_s is not None:
        end = os.pidfd_open(pid)
        # Readable as soon as the process has ended.
        select.select([end], [], [], after_s)
        os.close(end)
        os.kill(pid, signal.SIGKILL)

    _, status = os.waitpid(pid, 0)

    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True

    assert os.WIFEXITED(status), f"signal {os.WTERMSIG(status)}"
    assert os.WEXITSTATUS(status) == 0, log_file.read_text(errors="replace")[-3000:]

    return False


def _run(function: Callable[[], object], fault: Fault | None, log_file: Path) -> None:
    code = 1

    try:
        with log_file.open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)

        if fault is not None:
            fault()

        function()

        code = 0
    finally:
        # Not what pytest has registered to run at the end of its own process.
        if code != 0:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()

        os._exit(code)


def at_file_operation(directory: Path, number: int, part: str = "") -> Fault:
    """Kill before an operation on a file below a directory.

    :param directory: The directory.
    :param number: Which operation, from 1 on.
    :param part: A part of the paths that count.

    :returns: The fault.
    """

    def arm() -> None:
        left = number

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal left

            if event not in _FILE_OPERATIONS or isinstance(args[0], int):
                return

            path = os.fsdecode(args[0])

            # `shutil.rmtree` names what it removes relative to its directory.
            is_inside = path.startswith(str(directory)) or (
                event in ("os.remove", "os.rmdir") and not os.path.isabs(path)
            )

            if is_inside and part in path:
                left -= 1
                if left == 0:
                    die()

        sys.addaudithook(hook)

    return arm


def at_call(owner: Any, name: str, number: int = 1, *, after: bool = False) -> Fault:
    """Kill at a call of a function.

    :param owner: Its class or module.
    :param name: Its name.
    :param number: Which call, from 1 on.
    :param after: Whether the function runs first.

    :returns: The fault.
    """

    def arm() -> None:
        original = getattr(owner, name)
        left = number

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left

            left -= 1
            if left == 0:
                if after:
                    original(*args, **kwargs)

                die()

            return original(*args, **kwargs)

        setattr(owner, name, call)

    return arm


def within_file(owner: Any, names: tuple[str, ...], part: str, num_chars: int) -> Fault:
    """Kill when a part of a file is written.

    :param owner: The class whose methods open files.
    :param names: The names of these methods, which get a path and return a file.
    :param part: A part of the file's path.
    :param num_chars: How many bytes or characters reach the disk.

    :returns: The fault.
    """

    def arm() -> None:
        for name in names:
            setattr(owner, name, _cutting(getattr(owner, name), part, num_chars))

    return arm


def _cutting(
    original: Callable[..., IO[Any]], part: str, num_chars: int
) -> Callable[..., object]:
    def open_file(self: object, path: Path, *args: Any, **kwargs: Any) -> object:
        file = original(self, path, *args, **kwargs)

        if part in str(path) and file.writable():
            return _CutFile(file, num_chars)

        return file

    return open_file


class _CutFile:
    """A file that is written up to some point.

    :param file: The file.
    :param num_chars: Where the process dies.
    """

    def __init__(self, file: IO[Any], num_chars: int) -> None:
        self._file = file
        self._left = num_chars

    def write(self, data: Any) -> int:
        """Write, or die in the middle of it."""
        if len(data) >= self._left:
            self._file.write(data[: self._left])
            self._file.flush()

            die()

        self._left -= len(data)

        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
