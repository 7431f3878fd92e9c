"""What commands show while they work, and how they print a result for programs."""

from __future__ import annotations

import json
import math
import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Final, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typing_extensions import Self

T = TypeVar("T")

_LINE_EVERY_S: Final = 15.0
"""How often a stage shows itself where there is no terminal."""


def add_json_option(parser: ArgumentParser) -> None:
    """Add ``--json``, upon which a command prints one JSON document and nothing else.

    :param parser: The command.
    """
    parser.add_argument(
        "--json",
        action="store_true",
        help="print the result as one JSON document on standard output, and everything "
        "else on standard error",
    )


def print_json(document: Mapping[str, Any]) -> None:
    """Print a JSON document on standard output.

    :param document: Plain values; paths become texts, and numbers that JSON does not
        have (NaN, infinities) ``null``.
    """
    text = json.dumps(
        _to_plain(document), indent=2, ensure_ascii=False, allow_nan=False, default=str
    )

    sys.stdout.write(text + "\n")


def _to_plain(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return None
        case Mapping():
            return {str(k): _to_plain(v) for k, v in value.items()}
        case list() | tuple():
            return [_to_plain(v) for v in value]
        case _:
            return value


class Stages:
    """Shows how far stages are, and how long they will take, on standard error.

    A terminal gets a bar per stage. Elsewhere a stage prints a line now and then, the
    first one only after a quarter of a minute, and no control codes.

    :param is_timing: Whether the stages measure time: bars are then drawn only when a
        stage advances, and by no thread.
    :param console: Where to show them; standard error by default.
    """

    def __init__(
        self, *, is_timing: bool = False, console: Console | None = None
    ) -> None:
        self._console = console or Console(stderr=True, soft_wrap=True)
        self._is_timing = is_timing

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            auto_refresh=not is_timing,
        )

    def start(self, name: str, total: int | None = None) -> Stage:
        """Start a stage.

        :param name: What is done.
        :param total: The number of items, if known.

        :returns: The stage, a context manager.
        """
        if not self._console.is_terminal:
            return _LineStage(self._console, name, total)

        task_id = self._progress.add_task(name, total=total)

        return _BarStage(self._progress, task_id, refreshes=self._is_timing)

    def show(self, message: str) -> None:
        """Show a message that stays, above the bars.

        :param message: The message.
        """
        self._console.print(message, markup=False, highlight=False)

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
    """Something that goes through items."""

    def advance(self, num_items: int = 1) -> None:
        """Count items that are done.

        :param num_items: How many.
        """
        raise NotImplementedError

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Count items while they are used.

        :param items: The items.

        :yields: The items.
        """
        for item in items:
            yield item

            self.advance()

    def __enter__(self) -> Self:
        """Return the stage."""
        return self

    def __exit__(
        self,
        kls: type[BaseException] | None,
        ex: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        """End the stage."""


class _BarStage(Stage):
    def __init__(self, progress: Progress, task_id: TaskID, *, refreshes: bool) -> None:
        self._progress = progress
        self._task_id = task_id
        self._refreshes = refreshes

    def advance(self, num_items: int = 1) -> None:
        self._progress.advance(self._task_id, num_items)

        if self._refreshes:
            self._progress.refresh()

    def __exit__(
        self,
        kls: type[BaseException] | None,
        ex: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._progress.stop_task(self._task_id)


class _LineStage(Stage):
    def __init__(self, console: Console, name: str, total: int | None) -> None:
        self._console = console
        self._name = name
        self._total = total

        self._num_done = 0
        self._begun_at = self._last_line_at = time.monotonic()

    def advance(self, num_items: int = 1) -> None:
        self._num_done += num_items

        now = time.monotonic()

        if now - self._last_line_at < _LINE_EVERY_S:
            return

        self._last_line_at = now
        elapsed_s = now - self._begun_at

        line = f"{self._name}: {self._num_done:,}"
        if self._total is not None:
            line += f"/{self._total:,}"
        line += f", {elapsed_s:.0f} s"

        if self._total is not None and 0 < self._num_done <= self._total:
            left_s = elapsed_s * (self._total - self._num_done) / self._num_done
            line += f", about {left_s:.0f} s left"

        self._console.print(line, markup=False, highlight=False)
