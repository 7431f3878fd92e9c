"""Shows the stages of a build on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from typing_extensions import Self

T = TypeVar("T")


class Stages:
    """Shows one line per stage on standard error, if that is a terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def start(self, name: str, total: int | None = None) -> Stage:
        """Start a stage.

        :param name: What is done.
        :param total: The number of items, if known.

        :returns: The stage, a context manager.
        """
        return Stage(self._progress, self._progress.add_task(name, total=total))

    def __enter__(self) -> Self:
        """Show the display."""
        self._progress.start()

        return self

    def __exit__(
        self,
        kls: type[BaseException] | None,
        ex: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Stop the display."""
        self._progress.stop()


class Stage:
    """One line of the display.

    :param progress: The display.
    :param task_id: The line.
    """

    def __init__(self, progress: Progress, task_id: TaskID) -> None:
        self._progress = progress
        self._task_id = task_id

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Count items while they are used.

        :param items: The items.

        :yields: The items.
        """
        for item in items:
            yield item

            self._progress.advance(self._task_id)

    def advance(self, num_items: int) -> None:
        """Count items.

        :param num_items: Their number.
        """
        self._progress.advance(self._task_id, num_items)

    def __enter__(self) -> Self:
        """Return the stage."""
        return self

    def __exit__(
        self,
        kls: type[BaseException] | None,
        ex: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """Stop the clock of the line."""
        self._progress.stop_task(self._task_id)
