"""Runs functions in several processes, as `torchrun` does, by forks of this one."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed import destroy_process_group, is_initialized

if TYPE_CHECKING:
    from fairseq2.gang import Gangs

T = TypeVar("T")

TIMEOUT_S: Final = 120.0
"""Processes that wait for each other longer are ended."""


def run_processes(
    num_processes: int,
    function: Callable[..., T],
    *args: object,
    num_local_processes: int | None = None,
) -> list[T]:
    """Run a function in forked processes, in the environment of `torchrun`.

    A fork has what this process has imported, where a new interpreter imports for
    seconds.

    :param num_processes: The number of processes.
    :param function: Called once per process, with ``args``; what it returns must be
        picklable.
    :param args: Arguments of ``function``.
    :param num_local_processes: The number of processes per (pretended) host; all if
        ``None``.

    :returns: What each process has returned, by rank.

    :raises AssertionError: A process has failed; the message has its traceback.
    """
    context = get_context("fork")

    # As `torchrun`: the parent owns the store, hence no port is lost to another.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    connections, processes = [], []

    for rank in range(num_processes):
        receiver, sender = context.Pipe(duplex=False)

        env = _make_env(rank, num_processes, num_local_processes, store.port)

        process = context.Process(
            target=_run_rank, args=(sender, env, function, args), daemon=True
        )
        process.start()
        sender.close()

        connections.append(receiver)
        processes.append(process)

    try:
        return _collect(connections)
    finally:
        for process in processes:
            process.kill()
            process.join()


def make_gangs() -> Gangs:
    """Join the processes of :func:`run_processes`.

    :returns: The gangs of data parallelism without shards.
    """
    # Slow, and not for all tests
    from fairseq2.gang import ProcessGroupGang, create_parallel_gangs

    gang = ProcessGroupGang.create_default_process_group(torch.device("cpu"))

    return create_parallel_gangs(gang)


def _make_env(
    rank: int, num_processes: int, num_local_processes: int | None, port: int
) -> dict[str, str]:
    local_size = num_local_processes or num_processes

    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_RANK": str(rank % local_size),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _run_rank(
    sender: Connection,
    env: dict[str, str],
    function: Callable[..., object],
    args: tuple[object, ...],
) -> None:
    os.environ.update(env)

    try:
        sender.send((True, function(*args)))
    except BaseException:  # noqa: BLE001  # whatever it is, the parent tells it
        sender.send((False, traceback.format_exc()))

    if is_initialized():
        destroy_process_group()

    sender.close()


def _collect(connections: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}

    while len(results) < len(connections):
        waiting = [c for i, c in enumerate(connections) if i not in results]

        ready = wait(waiting, TIMEOUT_S)
        assert ready, f"{len(waiting)} processes did not end in {TIMEOUT_S} s."

        for connection in ready:
            assert isinstance(connection, Connection)

            rank = connections.index(connection)

            try:
                has_succeeded, result = connection.recv()
            except EOFError:
                has_succeeded, result = False, "It ended without a word."

            # The others would wait for it.
            assert has_succeeded, f"Process {rank} has failed. {result}"

            results[rank] = result

    return [results[rank] for rank in range(len(connections))]
