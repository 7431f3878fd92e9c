"""Runs the commands of the documentation in processes that have imported torch already.

A fresh interpreter imports for seconds, and the pages have dozens of commands. This
server imports once, and forks for every command that ``command_client.py`` sends: its
arguments, environment, working directory and open files. Like the server of
``moxe bench`` it never computes, so it has no thread that a fork could lose.

Run as ``python -m tests.docs.command_server SOCKET``; prints a line when it is ready.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import struct
import sys
import threading
import traceback
from copy import deepcopy
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NoReturn

from moxe_plugin.bench.stages import PRELOAD
from tests.docs.checking import CHECK_ONLY_VARIABLE, check_command

_PRELOAD: Final = (
    *PRELOAD,
    "lm_eval.__main__",
    "moxe_plugin.export.exporting",
    "moxe_plugin.hf",
    "moxe_plugin.routing_page.view",
    "moxe_plugin.train.generate",
    "torch.distributed.run",
)

_HEADER: Final = struct.Struct("!i")


def serve(path: str) -> Any:
    """Wait for commands; every one is forked off.

    :param path: Where the socket is to be.

    :returns: In a forked process, what it is to run; the server itself never returns.
    """
    for module in _PRELOAD:
        import_module(module)

    _read_tasks()

    # Collections would copy the memory that forked processes share.
    gc.freeze()

    # Nobody waits for the processes that look after a command.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        sys.stdout.write("ready\n")
        sys.stdout.flush()

        while True:
            connection, _ = listener.accept()

            if os.fork() == 0:
                listener.close()

                return _look_after(connection)

            connection.close()


def _read_tasks() -> None:
    # The harness has 14,000 tasks, and reads them for 6 seconds in each command.
    from lm_eval.tasks import TaskManager, _index

    original = _index.load_yaml
    known: dict[object, dict[str, Any]] = {}

    def load_yaml(path: Path, **options: bool) -> dict[str, Any]:
        key = path, *sorted(options.items())

        if key not in known:
            known[key] = original(path, **options)

        return deepcopy(known[key])

    _index.load_yaml = load_yaml

    TaskManager()


def _look_after(connection: socket.socket) -> Any:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    header, fds, _, _ = socket.recv_fds(connection, _HEADER.size, 3)
    (length,) = _HEADER.unpack(header)

    with connection.makefile("rb") as file:
        request = json.loads(file.read(length))

    pid = os.fork()
    if pid == 0:
        connection.close()

        for target, fd in enumerate(fds):
            os.dup2(fd, target)
            os.close(fd)

        return request

    _, status = os.waitpid(pid, 0)
    connection.sendall(_HEADER.pack(os.waitstatus_to_exitcode(status)))

    os._exit(0)


def run(request: Any) -> object:
    """Run a command as its own process would.

    :param request: What the client has sent.

    :returns: What the command exits with.
    """
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])

    program, *args = request["argv"]

    sys.argv = [program, *args]
    # Child processes of the command must not take this module for theirs.
    sys.modules["__main__"] = ModuleType("__main__")

    if CHECK_ONLY_VARIABLE in os.environ:
        return check_command(program, args)

    if program == "python":
        _run_python(args)

        return 0

    (script,) = entry_points(group="console_scripts", name=program)

    return script.load()()


def _run_python(args: list[str]) -> None:
    if args[0] == "-u":
        args = args[1:]

    if args[0] == "-m":
        sys.argv = args[1:]
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    elif args[0] == "-":
        sys.argv = args
        exec(compile(sys.stdin.read(), "<stdin>", "exec"), {"__name__": "__main__"})
    else:
        raise ValueError(f"`python {args[0]}` is not known to this server.")


def run_and_exit(request: Any) -> NoReturn:
    """Run a command and end this process, without tearing down what was imported.

    :param request: What the client has sent.
    """
    try:
        code = run(request)
    except SystemExit as ex:
        code = ex.code
    except BaseException:  # noqa: BLE001  # the process ends
        traceback.print_exc()
        code = 1

    if not isinstance(code, int | None):
        sys.stderr.write(f"{code}\n")
        code = 1

    # What an interpreter does at its end, but for the second that freeing takes.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()

    sys.stdout.flush()
    sys.stderr.flush()

    os._exit(code or 0)


if __name__ == "__main__":
    run_and_exit(serve(sys.argv[1]))
