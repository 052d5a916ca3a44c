"""Progress on the terminal: bars with the remaining time on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars
from rich.progress import Task as RichTask
from rich.text import Text

from onnxcompress.progress import Task


class _BarTask:
    def __init__(self, bars: Bars, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def advance(self, steps: int = 1) -> None:
        """Move the bar."""
        self._bars.advance(self._task, steps)


class TerminalProgress:
    """Draws a bar for every running task; on anything but a terminal it draws nothing.

    Args:
        console: Where to draw; stderr, so that stdout carries nothing but results.
        verbose: Whether logged lines are shown.
        quiet: Whether to show nothing at all.
    """

    def __init__(self, console: Console, *, verbose: bool = False, quiet: bool = False) -> None:
        self._console = console
        self._verbose = verbose and not quiet
        self._draws = console.is_terminal and not quiet
        self._bars: Bars | None = None

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        """Show a bar for the time of a ``with`` block."""
        outermost = self._bars is None
        bars = self._bars or Bars(
            *_columns(),
            console=self._console,
            transient=True,
            refresh_per_second=4,
            disable=not self._draws,
        )
        if outermost:
            self._bars = bars
            bars.start()
        task = bars.add_task(description, total=total)
        try:
            yield _BarTask(bars, task)
        finally:
            bars.refresh()
            bars.remove_task(task)
            if outermost:
                bars.stop()
                self._bars = None

    def log(self, message: str) -> None:
        """Print a line above the bars, when verbose."""
        if self._verbose:
            self._console.print(message, style="dim", markup=False, highlight=False)


class _Count(ProgressColumn):
    """Steps done of all; nothing where the number of steps is unknown."""

    def render(self, task: RichTask) -> Text:
        """Draw it."""
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}")


class _Remaining(ProgressColumn):
    """The remaining time; nothing while it is unknown."""

    max_refresh = 0.5

    def render(self, task: RichTask) -> Text:
        """Draw it."""
        if task.total is None or task.time_remaining is None:
            return Text("")
        return Text(f"{timedelta(seconds=int(task.time_remaining))} left", style="cyan")


def _columns() -> tuple[ProgressColumn, ...]:
    return (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        _Count(),
        TimeElapsedColumn(),
        _Remaining(),
    )
