"""Samples that come one feed at a time: Python callables and ONNX test data folders.

Each item is what one run is fed with: arrays by input name, of the inputs' own ranks. Where the
model's batch axes are dynamic, the length of the first axis counts samples, and neighbours of equal
shape are joined into larger batches; otherwise an item is one sample.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx
import onnx.numpy_helper

from onnxcompress.calibration.arrays import Array, open_binary
from onnxcompress.calibration.checks import Layout, check_dtype, match_names
from onnxcompress.errors import DataError, OnnxCompressError
from onnxcompress.interface import TensorSpec

Items: TypeAlias = Callable[[], Iterable[Mapping[str, Array]]]


class ItemSource:
    """Samples from an iterable of feeds that can be made anew for each reading.

    Args:
        items: Makes the iterable. Every call must give the same feeds.
        specs: The model's inputs.
        label: What to call the data in messages.
        sample_count: Number of samples when it is known; else everything is read once to count.

    Raises:
        DataError: If there is no item, or (when counting) an item does not fit.
    """

    def __init__(
        self,
        items: Items,
        specs: Sequence[TensorSpec],
        label: str,
        *,
        sample_count: int | None = None,
    ) -> None:
        self._items = items
        self._specs = tuple(specs)
        self._label = label
        self._batchable = bool(specs) and all(
            spec.shape and not isinstance(spec.shape[0], int) for spec in specs
        )
        names = frozenset(spec.name for spec in specs)
        self.layout = Layout() if self._batchable else Layout(names, 1)
        self.sample_count = (
            sum(self._length(item) for item in self._checked())
            if sample_count is None
            else sample_count
        )
        if not self.sample_count:
            raise DataError(f"{label} gave no samples", hint="It must give at least one feed.")

    def _checked(self) -> Iterator[dict[str, Array]]:
        """The items as arrays by input name, each fitting its input."""
        try:
            iterator = iter(self._items())
        except OnnxCompressError:
            raise
        except (Exception, SystemExit) as error:
            raise self._failure(error) from error
        number = 0
        while True:
            try:
                item = next(iterator)
            except StopIteration:
                return
            except OnnxCompressError:
                raise
            except (Exception, SystemExit) as error:
                raise self._failure(error) from error
            yield self._check(item, f"{self._label}, item {number}")
            number += 1

    def _failure(self, error: BaseException) -> DataError:
        return DataError(
            f"{self._label} failed: {type(error).__name__}: {error}",
            hint="The function must run without arguments and give one dict of arrays per sample.",
        )

    @staticmethod
    def _array(value: object, label: str) -> Array:
        try:
            return np.asarray(value)
        except ValueError as error:
            raise DataError(
                f"{label} is no array: its rows differ in length",
                hint="Yield numpy arrays; pad what differs in length.",
            ) from error

    def _check(self, item: object, label: str) -> dict[str, Array]:
        if not isinstance(item, Mapping):
            raise DataError(
                f"{label} is a {type(item).__name__}, not a dict of arrays by input name",
                hint="Yield {'input': array}, as for onnxruntime's run.",
            )
        chosen = match_names([str(name) for name in item], self._specs, label)
        out = {}
        for spec in self._specs:
            array = self._array(item[chosen[spec.name]], f"{label}, '{spec.name}'")
            check_dtype(spec, array.dtype, label)
            if spec.shape is not None:
                fits = len(spec.shape) == array.ndim and all(
                    not isinstance(d, int) or d == s
                    for d, s in zip(spec.shape, array.shape, strict=True)
                )
                if not fits or 0 in array.shape:
                    raise DataError(
                        f"{label}: shape {list(array.shape)} does not fit input '{spec}'",
                        hint="Items are fed as they are, so they include the batch axis.",
                    )
            out[spec.name] = array
        if self._batchable and len({len(array) for array in out.values()}) > 1:
            lengths = {name: len(array) for name, array in out.items()}
            raise DataError(
                f"{label}: the first axes have different lengths {lengths}",
                hint="The first axis of every input counts samples.",
            )
        return out

    def _length(self, item: Mapping[str, Array]) -> int:
        return len(next(iter(item.values()))) if self._batchable else 1

    def pieces(self, start: int, stop: int, size: int) -> Iterator[dict[str, Array]]:
        """See :class:`onnxcompress.calibration.dataset.Source`."""
        held: list[dict[str, Array]] = []
        position, seen = 0, start
        for item in self._checked():
            low, high = max(start - position, 0), min(stop - position, self._length(item))
            position += self._length(item)
            if low >= high:
                if position >= stop:
                    break
                continue
            if not self._batchable:
                seen += 1
                yield {name: array[np.newaxis] for name, array in item.items()}
                continue
            piece = {name: array[low:high] for name, array in item.items()}
            if held and any(held[0][n].shape[1:] != a.shape[1:] for n, a in piece.items()):
                yield _join(held)
                held = []
            seen += high - low
            held.append(piece)
            while sum(map(self._length, held)) >= size:
                joined = _join(held)
                yield {name: array[:size] for name, array in joined.items()}
                rest = {name: array[size:] for name, array in joined.items()}
                held = [rest] if self._length(rest) else []
        if held:
            yield _join(held)
        if seen < stop:
            raise DataError(
                f"{self._label} gave {seen - start} samples this time, {stop - start} expected",
                hint="It must give the same samples every time it is called.",
            )


def _join(held: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    if len(held) == 1:
        return dict(held[0])
    return {name: np.concatenate([piece[name] for piece in held]) for name in held[0]}


def test_data_sets(folder: Path) -> tuple[Path, ...]:
    """The folders with ``input_*.pb``: ``folder`` itself or its ``test_data_set_*``, in order."""
    if any(folder.glob("input_*.pb")):
        return (folder,)
    found = [path for path in folder.glob("test_data_set_*") if any(path.glob("input_*.pb"))]
    return tuple(sorted(found, key=_number))


def _number(path: Path) -> tuple[int, str]:
    digits = re.search(r"(\d+)$", path.stem)
    return (int(digits.group(1)) if digits else -1, path.name)


def open_test_data(folders: Sequence[Path], specs: Sequence[TensorSpec], label: str) -> ItemSource:
    """Samples from ONNX test data: ``input_0.pb``, ``input_1.pb``, ... per folder.

    A tensor belongs to the input of its name, or, if it has none that fits, of its number.

    Raises:
        DataError: If a file does not parse or does not fit.
    """

    def items() -> Iterator[Mapping[str, Array]]:
        for folder in folders:
            yield _read_test_data(folder, specs)

    return ItemSource(items, specs, label)


def _read_test_data(folder: Path, specs: Sequence[TensorSpec]) -> dict[str, Array]:
    paths = sorted(folder.glob("input_*.pb"), key=_number)
    names = {spec.name for spec in specs}
    out: dict[str, Array] = {}
    for number, path in enumerate(paths):
        with open_binary(path) as file:
            serialized = file.read()
        try:
            tensor = onnx.load_tensor_from_string(serialized)
            array = onnx.numpy_helper.to_array(tensor)
        except Exception as error:
            # protobuf's DecodeError derives from Exception alone.
            raise DataError(
                f"'{path}' is not a serialized tensor: {error}",
                hint="Only dense tensors are supported, no sequences or maps.",
            ) from error
        name = tensor.name
        if name not in names and number < len(specs):
            name = specs[number].name
        out[name] = array
    return out
