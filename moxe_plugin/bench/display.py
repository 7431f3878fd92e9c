"""Shows what a suite is doing: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, final

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typing_extensions import override

from moxe_plugin.bench.plan import RunPlan, StagePlan
from moxe_plugin.bench.progress import StageProgress

_LINE_EVERY_S: Final = 8.0


@contextmanager
def open_display(console: Console) -> Iterator[Display]:
    """Open the display that suits a console.

    :param console: The console.

    :yields: The display.
    """
    if not console.is_terminal:
        yield LineDisplay(console)

        return

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[details]}"),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )

    with Progress(*columns, console=console) as progress:
        yield BarDisplay(progress)


class Display(ABC):
    """Shows one stage after the other."""

    def __init__(self) -> None:
        self._title = ""
        self._num_stages = self._num_finished = 0

    def expect(self, plans: Sequence[RunPlan]) -> None:
        """Say what is to come.

        :param plans: The runs.
        """
        self._num_stages = sum(len(plan.stages) for plan in plans)

        self._show_num_finished()

    def start(self, plan: RunPlan, stage: StagePlan) -> None:
        """Begin a stage.

        :param plan: Its run.
        :param stage: The stage.
        """
        number = self._num_finished + 1

        self.start_step(f"[{number}/{self._num_stages}] {plan.title}: {stage.name}")

    def start_step(self, title: str) -> None:
        """Begin a stage, or something that is none.

        :param title: What to call it.
        """
        self._title = title
        self._begin(title)

    def finish(self, elapsed_s: float | None) -> None:
        """End what was begun.

        :param elapsed_s: Its time; ``None`` if it failed.
        """
        self._end()

        if self._num_stages:
            self._num_finished += 1
            self._show_num_finished()

        end = "failed" if elapsed_s is None else f"done in {elapsed_s:.0f} s"
        self.show(f"{self._title}: {end}")

    def skip(self, plan: RunPlan, stages: Sequence[StagePlan], reason: str) -> None:
        """Say that stages need not run.

        :param plan: Their run.
        :param stages: The stages.
        :param reason: Why.
        """
        self._num_finished += len(stages)
        self._show_num_finished()

        names = ", ".join(stage.name for stage in stages)
        self.show(f"{plan.title}: {names}: {reason}")

    @abstractmethod
    def update(self, progress: StageProgress) -> None:
        """Show how far the stage is; called often.

        :param progress: How far it is.
        """

    @abstractmethod
    def show(self, message: str) -> None:
        """Show a message that stays.

        :param message: The message.
        """

    @abstractmethod
    def _begin(self, title: str) -> None: ...

    @abstractmethod
    def _end(self) -> None: ...

    @abstractmethod
    def _show_num_finished(self) -> None: ...


@final
class LineDisplay(Display):
    """Prints a line whenever something begins or ends, and every few seconds.

    :param console: Where to print.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()

        self._console = console
        self._last_line_at = 0.0
        self._begun_at = 0.0
        self._first_fraction: tuple[float, float] | None = None

    @override
    def update(self, progress: StageProgress) -> None:
        now = time.monotonic()

        if self._first_fraction is None and progress.fraction:
            self._first_fraction = progress.fraction, now

        if now - self._last_line_at < _LINE_EVERY_S:
            return

        details = progress.details
        if not details and progress.fraction is not None:
            details = f"{progress.fraction:.0%}"

        line = f"{self._title}: {details or 'at work'}, {now - self._begun_at:.0f} s"

        if (left_s := self._estimate_left_s(progress.fraction, now)) is not None:
            line += f", about {left_s:.0f} s left"

        self.show(line)

    def _estimate_left_s(self, fraction: float | None, now: float) -> float | None:
        # A continued stage does not begin at 0.
        if fraction is None or self._first_fraction is None:
            return None

        first_fraction, first_at = self._first_fraction
        if fraction <= first_fraction:
            return None

        return (1 - fraction) * (now - first_at) / (fraction - first_fraction)

    @override
    def show(self, message: str) -> None:
        self._last_line_at = time.monotonic()

        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    @override
    def _begin(self, title: str) -> None:
        self._begun_at = time.monotonic()
        self._first_fraction = None

        self.show(f"{title} ...")

    @override
    def _end(self) -> None:
        pass

    @override
    def _show_num_finished(self) -> None:
        pass


@final
class BarDisplay(Display):
    """Shows a bar for the suite and one for the stage that runs.

    :param progress: Draws the bars; a column may show the field ``details``.
    """

    def __init__(self, progress: Progress) -> None:
        super().__init__()

        self._progress = progress
        self._suite: TaskID | None = None
        self._stage: TaskID | None = None

    @override
    def update(self, progress: StageProgress) -> None:
        assert self._stage is not None

        if progress.fraction is not None:
            self._progress.update(self._stage, total=1.0, completed=progress.fraction)

        self._progress.update(self._stage, details=progress.details)

    @override
    def show(self, message: str) -> None:
        self._progress.console.print(message, markup=False, highlight=False)

    @override
    def _begin(self, title: str) -> None:
        # rich would take brackets for markup.
        title = title.replace("[", r"\[")

        self._stage = self._progress.add_task(title, total=None, details="")

    @override
    def _end(self) -> None:
        assert self._stage is not None

        self._progress.remove_task(self._stage)

    @override
    def _show_num_finished(self) -> None:
        if self._suite is None:
            self._suite = self._progress.add_task("all stages", details="")

        self._progress.update(
            self._suite, total=self._num_stages, completed=self._num_finished
        )
