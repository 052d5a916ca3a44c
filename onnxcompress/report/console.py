"""Where text goes and how errors look; light to import, so that an early error can be told."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text


class _Console(Console):
    """A console that leaves it to its caller what to do when nobody reads any more."""

    def on_broken_pipe(self) -> None:
        """Go on raising; rich would end the process with exit code 1."""
        raise BrokenPipeError


def console(*, stderr: bool = False) -> Console:
    """A console that writes plain text of the full width where it is not a terminal."""
    made = _Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not made.is_terminal:
        made = _Console(stderr=stderr, highlight=False, width=100, no_color=True)
    return made


def error(message: str, hint: str | None) -> Text:
    """An error with its hint."""
    text = Text.assemble(("error: ", "bold red"), message)
    if hint:
        text.append(f"\n{hint}", "dim")
    return text
