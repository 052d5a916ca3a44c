"""Write files so that a reader sees the old ones or the new ones, never a part."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def replacing(targets: Sequence[Path]) -> Iterator[tuple[Path, ...]]:
    """Give a temporary file beside each target; at the end put them all in place, or none.

    Whatever ends the ``with`` block early (an error, Ctrl-C) removes the temporary files and leaves
    the targets as they were. A target that exists keeps its permissions.

    Args:
        targets: The files to write, in one folder each that exists; the last one is replaced last,
            so let it be the one that refers to the others.

    Yields:
        The temporary files, empty, in the order of the targets.

    Raises:
        OSError: If a file cannot be made, written or moved.
    """
    token = secrets.token_hex(4)
    parts = tuple(target.with_name(f".{target.name}.{token}.part") for target in targets)
    try:
        for part, target in zip(parts, targets, strict=True):
            _create(part, target)
        yield parts
        for part in parts:
            _flush(part)
        _swap(parts, targets, token)
    finally:
        for part in parts:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


def _create(part: Path, target: Path) -> None:
    descriptor = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    os.close(descriptor)
    if target.exists():
        part.chmod(stat.S_IMODE(target.stat().st_mode))


def _flush(path: Path) -> None:
    """Wait until the data is on the disk, so that a full disk shows now and not after the move."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _swap(parts: Sequence[Path], targets: Sequence[Path], token: str) -> None:
    """Move every part to its target; on any failure move the old files back."""
    backups: list[tuple[Path, Path]] = []
    placed: list[Path] = []
    try:
        for part, target in zip(parts[:-1], targets[:-1], strict=True):
            if target.exists():
                backup = target.with_name(f".{target.name}.{token}.old")
                backups.append((backup, target))
                target.rename(backup)
            placed.append(target)
            part.replace(target)
        parts[-1].replace(targets[-1])
    except BaseException:
        for target in placed:
            target.unlink(missing_ok=True)
        for backup, target in backups:
            if backup.exists():
                backup.replace(target)
        raise
    for backup, _ in backups:
        backup.unlink(missing_ok=True)
