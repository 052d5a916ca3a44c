"""Arrays on disk, read a few samples at a time.

Reading is by position in the file and not by mapping it: mapped pages count as the process's
memory, so a calibration set would seem to be held in full.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from onnxcompress.errors import DataError

Array: TypeAlias = npt.NDArray[np.generic]

_TRUNCATED = "The file is damaged or still being written; write it again."


class LazyArray(Protocol):
    """An array whose first axis can be read in pieces."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of every axis."""

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Element type."""

    def __getitem__(self, rows: slice, /) -> Array:
        """The elements ``rows`` of the first axis, in memory."""


class ArrayFile:
    """A .npy array inside a file, read by position.

    Args:
        source: Path of the file, opened for each read so that a folder of thousands of files does
            not exhaust the file descriptors; or a temporary file, closed with this array.
        offset: Where the .npy header starts.
        size: Bytes available from ``offset``.
        label: What to call the array in messages.

    Raises:
        DataError: If the header is not valid, or the array has Python objects or is cut short.
    """

    def __init__(self, source: Path | IO[bytes], offset: int, size: int, label: str) -> None:
        self._source = source
        self._label = label
        if not isinstance(source, Path):
            weakref.finalize(self, source.close)
        with self._opened() as file:
            file.seek(offset)
            self.shape, fortran, self.dtype = _read_header(file, label)
            self._start = file.tell()
        self._row_shape = self.shape[1:]
        self._row_bytes = self.dtype.itemsize * math.prod(self._row_shape)
        total = self.dtype.itemsize * math.prod(self.shape)
        there = size - (self._start - offset)
        if there < total:
            raise DataError(
                f"{label} is cut short: {total} bytes announced, {there} there",
                hint=_TRUNCATED,
            )
        if fortran and len(self.shape) > 1:
            self._spool_c_order()

    def _opened(self) -> AbstractContextManager[IO[bytes]]:
        if isinstance(self._source, Path):
            return open_binary(self._source)
        return contextlib.nullcontext(self._source)

    def _spool_c_order(self) -> None:
        """Rewrite a Fortran-ordered array in C order into a temporary file."""
        flat = self._read(0, math.prod(self.shape))
        spool = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this array
        spool.write(flat.reshape(self.shape[::-1]).transpose().tobytes())
        weakref.finalize(self, spool.close)
        self._source, self._start = spool, 0

    def _read(self, first: int, count: int) -> Array:
        """``count`` elements from element ``first`` on, flat."""
        out = np.empty(count, self.dtype)
        with self._opened() as file:
            file.seek(self._start + first * self.dtype.itemsize)
            if file.readinto(out.view(np.uint8).data) < out.nbytes:  # type: ignore[attr-defined]
                raise DataError(f"{self._label} is cut short", hint=_TRUNCATED)
        return out

    def __getitem__(self, rows: slice, /) -> Array:
        """The elements ``rows`` (step 1) of the first axis."""
        if not self.shape:
            raise DataError(f"{self._label} is a scalar and has no samples")
        start, stop, _ = rows.indices(self.shape[0])
        width = math.prod(self._row_shape)
        flat = self._read(start * width, max(0, stop - start) * width)
        return flat.reshape(max(0, stop - start), *self._row_shape)


class Shards:
    """Arrays of several files as one, along the first axis.

    Args:
        parts: The arrays in order, with what to call each of them.

    Raises:
        DataError: If element types or shapes beyond the first axis differ.
    """

    def __init__(self, parts: Sequence[tuple[str, LazyArray]]) -> None:
        first_label, first = parts[0]
        for label, part in parts:
            if part.dtype != first.dtype or part.shape[1:] != first.shape[1:] or not part.shape:
                raise DataError(
                    f"{label} ({part.dtype} {list(part.shape)}) does not continue {first_label} "
                    f"({first.dtype} {list(first.shape)})",
                    hint="All files of a folder must hold samples of one shape and type.",
                )
        self._parts = tuple(part for _, part in parts)
        self._ends = np.cumsum([part.shape[0] for part in self._parts])
        self.shape = (int(self._ends[-1]), *first.shape[1:])
        self.dtype = first.dtype

    def __getitem__(self, rows: slice, /) -> Array:
        """The elements ``rows`` (step 1) of the first axis."""
        start, stop, _ = rows.indices(self.shape[0])
        pieces = []
        for part, end in zip(self._parts, self._ends.tolist(), strict=True):
            begin = end - part.shape[0]
            low, high = max(start, begin), min(stop, end)
            if low < high:
                pieces.append(part[slice(low - begin, high - begin)])
        if not pieces:
            return np.empty((0, *self.shape[1:]), self.dtype)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _read_header(file: IO[bytes], label: str) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    except (ValueError, EOFError, OSError, SyntaxError) as error:
        raise DataError(f"{label} is not a .npy array: {error}", hint=_TRUNCATED) from error
    if any(length < 0 for length in shape):
        raise DataError(
            f"{label} is not a .npy array: its header announces the shape {list(shape)}",
            hint=_TRUNCATED,
        )
    if dtype.hasobject:
        raise DataError(
            f"{label} holds Python objects, which are never unpickled",
            hint="Save plain numeric arrays of equal shape (numpy.stack the samples).",
        )
    return shape, fortran, dtype


def open_npy(path: Path) -> LazyArray:
    """Open a .npy file.

    Raises:
        DataError: If it cannot be read.
    """
    with open_binary(path) as file:
        size = os.fstat(file.fileno()).st_size
    return ArrayFile(path, 0, size, f"'{path}'")


def open_npz(path: Path) -> dict[str, LazyArray]:
    """Open the arrays of a .npz file by name; compressed ones go through a temporary file.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        with open_binary(path) as file, zipfile.ZipFile(file) as archive:
            infos = [i for i in archive.infolist() if not i.is_dir()]
            return {
                i.filename.removesuffix(".npy"): _open_member(path, file, archive, i) for i in infos
            }
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise DataError(f"'{path}' is not a valid .npz file: {error}", hint=_TRUNCATED) from error


def _open_member(
    path: Path, file: IO[bytes], archive: zipfile.ZipFile, info: zipfile.ZipInfo
) -> LazyArray:
    label = f"array '{info.filename.removesuffix('.npy')}' of '{path}'"
    if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 0x1:
        # The local header repeats the name and may have an extra field of another length than
        # the directory's.
        file.seek(info.header_offset)
        local = file.read(30)
        if len(local) < 30 or local[:4] != b"PK\x03\x04":
            raise DataError(f"{label} is cut short", hint=_TRUNCATED)
        lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        offset = info.header_offset + 30 + lengths
        available = min(info.file_size, os.fstat(file.fileno()).st_size - offset)
        array = ArrayFile(path, offset, available, label)
        _check_sum(file, offset, info, label)
        return array
    spool = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the array
    try:
        with archive.open(info) as member:
            shutil.copyfileobj(member, spool, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise DataError(f"{label} cannot be unpacked: {error}", hint=_TRUNCATED) from error
    return ArrayFile(spool, 0, spool.tell(), label)


def _check_sum(file: IO[bytes], offset: int, info: zipfile.ZipInfo, label: str) -> None:
    """Read a stored member once, as zipfile would, since later reads go past zipfile.

    Raises:
        DataError: If its bytes are not those that were written.
    """
    file.seek(offset)
    left, crc = info.file_size, 0
    while left and (block := file.read(min(left, 1 << 20))):
        crc = zlib.crc32(block, crc)
        left -= len(block)
    if crc != info.CRC:
        raise DataError(f"{label} has a wrong checksum", hint=_TRUNCATED)


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading.

    Raises:
        DataError: If it cannot be opened.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror or error}") from error


def shard_npz(paths: Iterable[Path]) -> dict[str, LazyArray]:
    """Open several .npz files as one, each array continued from file to file.

    Raises:
        DataError: If a file cannot be read, or the files do not hold the same arrays.
    """
    opened = [(path, open_npz(path)) for path in paths]
    first_path, first = opened[0]
    for path, arrays in opened:
        if arrays.keys() != first.keys():
            raise DataError(
                f"'{path}' holds {sorted(arrays)}, but '{first_path}' holds {sorted(first)}",
                hint="All .npz files of a folder must hold the same arrays.",
            )
    return {
        name: Shards([(f"array '{name}' of '{path}'", arrays[name]) for path, arrays in opened])
        for name in first
    }
