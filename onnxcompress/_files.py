"""Size and hash of model files."""

from __future__ import annotations

import hashlib
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from onnxcompress._guards import tensor_protos
from onnxcompress.errors import ModelError

_BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class FileSizes:
    """Size of a model on disk, with its external data.

    Attributes:
        raw_bytes: As it is.
        deflated_bytes: Compressed by zlib at level 6 in blocks of 8 MiB, as archives and app stores
            ship it.
    """

    raw_bytes: int
    deflated_bytes: int


def file_sizes(path: str | os.PathLike[str]) -> FileSizes:
    """Measure a model file and its external data, streaming (about 64 MiB of memory).

    Raises:
        ModelError: If a file cannot be read.
    """
    files = [Path(path), *external_files(path)]
    workers = os.cpu_count() or 1
    raw = deflated = 0
    try:
        with ThreadPoolExecutor(workers) as pool:
            for file in files:
                with file.open("rb") as stream:
                    while blocks := _blocks(stream, workers):
                        raw += sum(map(len, blocks))
                        deflated += sum(pool.map(_deflated, blocks))
    except OSError as error:
        raise ModelError(f"cannot read '{path}': {error.strerror or error}") from error
    return FileSizes(raw, deflated)


def _blocks(stream: BinaryIO, count: int) -> list[bytes]:
    """Up to ``count`` blocks, none when the file has ended."""
    return [block for _ in range(count) if (block := stream.read(_BLOCK_BYTES))]


def _deflated(block: bytes) -> int:
    return len(zlib.compress(block, 6))


def external_files(path: str | os.PathLike[str]) -> tuple[Path, ...]:
    """The files that a model's external data is in, each once, sorted.

    Raises:
        ModelError: If the model cannot be read.
    """
    path = Path(path)
    try:
        proto = onnx.load_model(path, format="protobuf", load_external_data=False)
    except (OSError, DecodeError) as error:
        raise ModelError(f"cannot read '{path}': {error}") from error
    locations = {
        entry.value
        for tensor in tensor_protos(proto)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return tuple(sorted(path.parent / location for location in locations))


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of the file at ``path`` alone, hexadecimal, as ``sha256sum`` prints it.

    Raises:
        ModelError: If it cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"cannot read '{path}': {error.strerror or error}") from error
