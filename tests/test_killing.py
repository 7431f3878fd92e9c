"""Processes that tests kill leave nothing behind that others wait for."""

from __future__ import annotations

from pathlib import Path

from tqdm.auto import tqdm

from tests.killing import die, run_killed


def test_process_killed_while_it_draws_progress_keeps_no_lock(tmp_path: Path) -> None:
    lock = tqdm.get_lock()  # type: ignore[no-untyped-call]

    def draw() -> None:
        lock.acquire()

        die()

    assert run_killed(draw, log_file=tmp_path / "log")

    assert lock.acquire(False)
    lock.release()
