"""How long-running work reports that it is alive, without knowing about terminals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One running piece of work."""

    def advance(self, steps: int = 1) -> None:
        """Say that ``steps`` more of the total are done."""


class Progress(Protocol):
    """Receives progress; the terminal draws it, everything else uses :class:`SilentProgress`."""

    def task(self, description: str, total: int | None = None) -> AbstractContextManager[Task]:
        """Open a task of ``total`` steps (unknown when None) for the time of a ``with`` block."""

    def log(self, message: str) -> None:
        """Say one line that stays on the screen (verbose output)."""


class _SilentTask:
    def advance(self, steps: int = 1) -> None:
        """Do nothing."""


class SilentProgress:
    """A :class:`Progress` that shows nothing; the default of the Python API."""

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        """Yield a task that ignores its steps."""
        del description, total
        yield _SilentTask()

    def log(self, message: str) -> None:
        """Do nothing."""
        del message
