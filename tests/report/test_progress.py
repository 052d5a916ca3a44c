from __future__ import annotations

import io

import pytest
from rich.console import Console

from onnxcompress.report.progress import TerminalProgress


def screen(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_bars_on_a_terminal() -> None:
    console = screen(terminal=True)
    progress = TerminalProgress(console)
    with progress.task("calibrating", 4) as task, progress.task("inner") as inner:
        for _ in range(3):
            task.advance()
        inner.advance()
    assert "calibrating" in shown(console)
    assert "3/4" in shown(console)
    assert "left" in shown(console)


def test_a_task_of_unknown_length_counts_nothing() -> None:
    console = screen(terminal=True)
    with TerminalProgress(console).task("thinking"):
        pass
    assert "thinking" in shown(console)
    assert "left" not in shown(console)
    assert "None" not in shown(console)


def test_one_task_after_the_other() -> None:
    console = screen(terminal=True)
    progress = TerminalProgress(console)
    for name in ("first", "second"):
        with progress.task(name, 1) as task:
            task.advance()
    assert "first" in shown(console)
    assert "second" in shown(console)


def test_a_task_that_fails_frees_the_screen() -> None:
    console = screen(terminal=True)
    progress = TerminalProgress(console)
    with pytest.raises(ValueError, match="why"), progress.task("failing", 1):
        raise ValueError("why")
    with progress.task("next", 1) as task:
        task.advance()
    assert "next" in shown(console)


def test_nothing_is_drawn_elsewhere() -> None:
    console = screen(terminal=False)
    progress = TerminalProgress(console)
    with progress.task("calibrating", 4) as task:
        task.advance()
    progress.log("a line")
    assert shown(console) == ""


@pytest.mark.parametrize(("quiet", "expected"), [(False, "a [line]\n"), (True, "")])
def test_lines_when_verbose(quiet: bool, expected: str) -> None:
    console = screen(terminal=False)
    TerminalProgress(console, verbose=True, quiet=quiet).log("a [line]")
    assert shown(console) == expected
