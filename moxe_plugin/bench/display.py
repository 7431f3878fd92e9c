"""Shows what a suite is doing: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
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


class Step(ABC):
    """Something that runs: a stage, or what belongs to no run.

    :param display: What shows it.
    :param title: What to call it.
    :param is_stage: Whether it counts among the stages.
    """

    def __init__(self, display: Display, title: str, *, is_stage: bool) -> None:
        self._display = display
        self._title = title
        self._is_stage = is_stage

    @abstractmethod
    def update(self, progress: StageProgress) -> None:
        """Show how far the step is; called often.

        :param progress: How far it is.
        """

    def finish(self, elapsed_s: float | None) -> None:
        """End the step.

        :param elapsed_s: Its time; ``None`` if it failed.
        """
        if self._is_stage:
            self._display.count_finished(1)

        end = "failed" if elapsed_s is None else f"done in {elapsed_s:.0f} s"
        self._display.show(f"{self._title}: {end}")


class Display(ABC):
    """Shows steps, several at a time; its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._num_stages = self._num_started = self._num_finished = 0

    def expect(self, plans: Sequence[RunPlan]) -> None:
        """Say what is to come.

        :param plans: The runs.
        """
        self._num_stages = sum(len(plan.stages) for plan in plans)

        self.count_finished(0)

    def start(self, plan: RunPlan, stage: StagePlan) -> Step:
        """Begin a stage.

        :param plan: Its run.
        :param stage: The stage.

        :returns: The stage as the display shows it.
        """
        with self._lock:
            self._num_started += 1
            number = self._num_started

        title = f"[{number}/{self._num_stages}] {plan.title}: {stage.name}"

        return self._start(title, is_stage=True)

    def start_step(self, title: str) -> Step:
        """Begin something that is no stage.

        :param title: What to call it.

        :returns: The step as the display shows it.
        """
        return self._start(title, is_stage=False)

    def skip(self, plan: RunPlan, stages: Sequence[StagePlan], reason: str) -> None:
        """Say that stages need not run.

        :param plan: Their run.
        :param stages: The stages.
        :param reason: Why.
        """
        with self._lock:
            self._num_started += len(stages)

        self.count_finished(len(stages))

        names = ", ".join(stage.name for stage in stages)
        self.show(f"{plan.title}: {names}: {reason}")

    def count_finished(self, num_stages: int) -> None:
        """Say that stages are finished.

        :param num_stages: How many.
        """
        with self._lock:
            self._num_finished += num_stages
            self._show_num_finished(self._num_finished, self._num_stages)

    @abstractmethod
    def show(self, message: str) -> None:
        """Show a message that stays.

        :param message: The message.
        """

    @abstractmethod
    def _start(self, title: str, *, is_stage: bool) -> Step: ...

    @abstractmethod
    def _show_num_finished(self, num_finished: int, num_stages: int) -> None: ...


@final
class LineDisplay(Display):
    """Prints a line whenever something begins or ends, and every few seconds.

    :param console: Where to print.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()

        self._console = console

    @override
    def show(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)

    @override
    def _start(self, title: str, *, is_stage: bool) -> Step:
        self.show(f"{title} ...")

        return _LineStep(self, title, is_stage=is_stage)

    @override
    def _show_num_finished(self, num_finished: int, num_stages: int) -> None:
        pass


@final
class _LineStep(Step):
    def __init__(self, display: Display, title: str, *, is_stage: bool) -> None:
        super().__init__(display, title, is_stage=is_stage)

        self._begun_at = self._last_line_at = time.monotonic()
        self._first_fraction: tuple[float, float] | None = None

    @override
    def update(self, progress: StageProgress) -> None:
        now = time.monotonic()

        if self._first_fraction is None and progress.fraction:
            self._first_fraction = progress.fraction, now

        if now - self._last_line_at < _LINE_EVERY_S:
            return

        self._last_line_at = now

        details = progress.details
        if not details and progress.fraction is not None:
            details = f"{progress.fraction:.0%}"

        line = f"{self._title}: {details or 'at work'}, {now - self._begun_at:.0f} s"

        if (left_s := self._estimate_left_s(progress.fraction, now)) is not None:
            line += f", about {left_s:.0f} s left"

        self._display.show(line)

    def _estimate_left_s(self, fraction: float | None, now: float) -> float | None:
        # A continued stage does not begin at 0.
        if fraction is None or self._first_fraction is None:
            return None

        first_fraction, first_at = self._first_fraction
        if fraction <= first_fraction:
            return None

        return (1 - fraction) * (now - first_at) / (fraction - first_fraction)


@final
class BarDisplay(Display):
    """Shows a bar for the suite and one for each stage that runs.

    :param progress: Draws the bars; a column may show the field ``details``.
    """

    def __init__(self, progress: Progress) -> None:
        super().__init__()

        self._progress = progress
        self._suite: TaskID | None = None

    @override
    def show(self, message: str) -> None:
        self._progress.console.print(message, markup=False, highlight=False)

    @override
    def _start(self, title: str, *, is_stage: bool) -> Step:
        return _BarStep(self, self._progress, title, is_stage=is_stage)

    @override
    def _show_num_finished(self, num_finished: int, num_stages: int) -> None:
        if self._suite is None:
            self._suite = self._progress.add_task("all stages", details="")

        self._progress.update(self._suite, total=num_stages, completed=num_finished)


@final
class _BarStep(Step):
    def __init__(
        self, display: Display, progress: Progress, title: str, *, is_stage: bool
    ) -> None:
        super().__init__(display, title, is_stage=is_stage)

        self._progress = progress

        # rich would take brackets for markup.
        name = title.replace("[", r"\[")

        self._task = progress.add_task(name, total=None, details="")

    @override
    def update(self, progress: StageProgress) -> None:
        if progress.fraction is not None:
            self._progress.update(self._task, total=1.0, completed=progress.fraction)

        self._progress.update(self._task, details=progress.details)

    @override
    def finish(self, elapsed_s: float | None) -> None:
        self._progress.remove_task(self._task)

        super().finish(elapsed_s)
