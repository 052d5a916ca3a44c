"""Writing the result: refused early when it cannot work, invisible until it is complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from onnxcompress.errors import OutputError, UsageError

_SUFFIX = ".onnx"


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
    if same or original.resolve() == output.resolve():
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
