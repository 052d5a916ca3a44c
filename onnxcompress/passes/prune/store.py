"""Activations between two stages of a run: in memory up to a limit, on disk beyond it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from onnxcompress.errors import PassError

Array = npt.NDArray[np.generic]

MEMORY_BYTES = 1 << 30
"""Activations held in memory; whatever comes on top goes to the job's scratch folder."""


@dataclass(frozen=True, slots=True)
class Handle:
    """A stored array: its number, element type and shape, and its file where it lies on disk."""

    number: int
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]
    path: Path | None


class ActivationStore:
    """Keeps arrays until they are dropped.

    Args:
        work_dir: Where a folder for the arrays on disk may be made.
        memory_bytes: How much may stay in memory.
    """

    def __init__(self, work_dir: Path, memory_bytes: int = MEMORY_BYTES) -> None:
        self._work_dir = work_dir
        self._limit = memory_bytes
        self._held: dict[int, Array] = {}
        self._used = 0
        self._count = 0
        self._folder: Path | None = None

    @property
    def used_bytes(self) -> int:
        """Bytes in memory now."""
        return self._used

    def put(self, array: Array) -> Handle:
        """Keep an array.

        Raises:
            PassError: If the disk has no room for it.
        """
        self._count += 1
        # Strings cannot be mapped from a file, and there are never many of them.
        if array.dtype.hasobject or self._used + array.nbytes <= self._limit:
            self._held[self._count] = array
            self._used += array.nbytes
            return Handle(self._count, array.dtype, array.shape, None)
        try:
            if self._folder is None:
                folder = tempfile.mkdtemp(dir=self._work_dir, prefix="activations-")
                self._folder = Path(folder)
            path = self._folder / f"{self._count}.npy"
            np.save(path, array, allow_pickle=False)
        except OSError as error:
            raise PassError(
                "prune",
                f"the activations of the calibration samples cannot be kept in "
                f"'{self._work_dir}': {error.strerror or error}",
                hint="Make room there, or lower prune.samples.",
            ) from error
        return Handle(self._count, array.dtype, array.shape, path)

    def get(self, handle: Handle) -> Array:
        """The array."""
        if handle.path is None:
            return self._held[handle.number]
        loaded: Array = np.load(handle.path, allow_pickle=False)
        return loaded

    def drop(self, handle: Handle) -> None:
        """Forget the array."""
        if handle.path is not None:
            handle.path.unlink(missing_ok=True)
            return
        self._used -= self._held.pop(handle.number).nbytes
