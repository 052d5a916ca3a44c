"""Everything onnxcompress raises on purpose.

Each error carries the exit code that the command line returns for it and, where there is one, a
hint that says what to do next. Any other exception that reaches the command line is a bug of ours.
"""

from __future__ import annotations

from typing import ClassVar


class OnnxCompressError(Exception):
    """Base of all errors that a user can meet and mend.

    Args:
        message: What went wrong and where (file, node, input name, the shape seen).
        hint: What to do next, as one sentence.
    """

    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(OnnxCompressError):
    """The request cannot be understood: an unknown pass, option or value, or a contradiction."""

    exit_code = 2


class ModelError(OnnxCompressError):
    """The model cannot be used: it does not parse, is invalid, or does not run."""


class DataError(OnnxCompressError):
    """Calibration or evaluation data cannot be used with the model."""


class OutputError(OnnxCompressError):
    """The result cannot be written where it was asked for."""


class ProviderError(OnnxCompressError):
    """The execution provider asked for is not available."""


class PassError(OnnxCompressError):
    """A pass failed, or what it produced is not valid; the model is as it was before the pass.

    Args:
        pass_name: Name of the pass, as on the command line.
        message: What went wrong.
        hint: What to do next.
    """

    def __init__(self, pass_name: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(f"pass '{pass_name}': {message}", hint=hint)
        self.pass_name = pass_name
