"""Writing the result: refused early when it cannot work, invisible until it is complete."""

from __future__ import annotations

import enum
import os
import shutil
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from onnxcompress._atomic import replacing
from onnxcompress.errors import OutputError, UsageError

_SUFFIX = ".onnx"
_NOT_TEXT = frozenset({_SUFFIX, ".npz", ".npy"})


class SideFile(enum.Enum):
    """A text file that a run may write besides the result."""

    REPORT = "the JSON report"
    RECIPE = "the recipe"


def check_output(original: Path, output: Path) -> None:
    """Refuse an output path that cannot work, before anything is computed.

    Raises:
        UsageError: If the output is the input itself (through links too), or is not named .onnx.
        OutputError: If its folder is missing or not writable, or it is a folder itself.
    """
    if output.suffix != _SUFFIX:
        raise UsageError(
            f"output '{output}' does not end in {_SUFFIX}", hint=f"Name it {output.stem}{_SUFFIX}."
        )
    if output.is_dir():
        raise OutputError(f"output '{output}' is a folder", hint="Name a file.")
    same = output.exists() and original.exists() and original.samefile(output)
    if same or os.path.realpath(original) == os.path.realpath(output):
        raise UsageError(
            f"input and output are the same file '{output}'", hint="Give the result another name."
        )
    folder = output.parent
    if not folder.is_dir():
        raise OutputError(
            f"folder '{folder}' of the output does not exist",
            hint="Make it first, or choose another.",
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"folder '{folder}' of the output is not writable")


def check_sidecar(model: ir.Model, output: Path) -> None:
    """Refuse an output whose external data file is one that the input reads.

    Raises:
        UsageError: If it is.
    """
    sidecar = (output.parent / f"{output.name}.data").resolve()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and Path(tensor.path).resolve() == sidecar:
            raise UsageError(
                f"'{sidecar.name}' holds the input's weights; the output's would overwrite them",
                hint="Give the result another name.",
            )


def check_side_file(path: Path, kind: SideFile) -> None:
    """Refuse a place for a text file that cannot work, or that holds a file of another kind.

    A file that is there may be replaced only by one of its own kind, so that a slip of the keyboard
    does not cost a model, its weights or its data.

    Raises:
        UsageError: If a file of another kind would be overwritten, or come to look like a model.
        OutputError: If the folder is missing, or nothing can be written there.
    """
    foreign = path.suffix in _NOT_TEXT or (path.is_file() and not _is_of(path, kind))
    if foreign:
        raise UsageError(
            f"{kind.value} would overwrite '{path}'"
            if path.exists()
            else f"{kind.value} would be named like a model or its data, '{path}'",
            hint="Give it a name of its own, such as "
            f"{'report.json' if kind is SideFile.REPORT else 'recipe.toml'}.",
        )
    reason = None
    if path.is_dir():
        reason = "it is a folder"
    elif not path.parent.is_dir():
        reason = f"there is no folder '{path.parent}'"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = "it is not writable"
    if reason is not None:
        raise OutputError(f"{kind.value} '{path}' cannot be written: {reason}")


def _is_of(path: Path, kind: SideFile) -> bool:
    """Whether a file holds what ``kind`` does, or nothing."""
    try:
        text = path.read_text(encoding="utf-8")
        if kind is SideFile.RECIPE:
            tomllib.loads(text)
            return True
    except (OSError, ValueError):
        return False
    return not text.strip() or text.lstrip().startswith("{")


def write_side_file(path: Path, kind: SideFile, text: str) -> None:
    """Write a text file, atomically where it is a regular one.

    Raises:
        OutputError: If it cannot be written.
    """
    try:
        if path.exists() and not path.is_file():  # a terminal or a pipe
            path.write_text(text, encoding="utf-8")
            return
        with replacing([Path(os.path.realpath(path))]) as (part,):
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"{kind.value} '{path}' cannot be written: {error.strerror or error}"
        ) from error


@contextmanager
def staging(output: Path) -> Iterator[Path]:
    """A path beside ``output``, of the same file name, that vanishes with all files beside it.

    It lies in the same file system, so that :func:`publish` can move the result in one step.

    Raises:
        OutputError: If nothing can be written beside the output.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=".onnxcompress-", dir=output.parent))
    except OSError as error:
        raise OutputError(
            f"nothing can be written beside '{output}': {error.strerror or error}"
        ) from error
    try:
        yield folder / output.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def scratch() -> Iterator[Path]:
    """A private folder for scratch files, in the system's place for them.

    Raises:
        OutputError: If none can be made.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="onnxcompress-", ignore_cleanup_errors=True)
    except OSError as error:
        raise OutputError(
            f"no temporary folder can be made: {error.strerror or error}",
            hint="Free some space, or set TMPDIR to a folder with space.",
        ) from error
    with folder as name:
        yield Path(name)


def publish(staged: Path, output: Path) -> None:
    """Move a staged model with its external data to where it was asked for, the model last.

    Raises:
        OutputError: If a file cannot be moved.
    """
    others = sorted(path for path in staged.parent.iterdir() if path != staged)
    try:
        for path in (*others, staged):
            path.replace(output.parent / path.name)
    except OSError as error:
        raise OutputError(f"'{output}' cannot be written: {error.strerror or error}") from error
