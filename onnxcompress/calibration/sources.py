"""Where calibration and evaluation samples come from.

:func:`open_dataset` accepts every form of data a user may have and turns it into a
:class:`~onnxcompress.calibration.dataset.Dataset` that fits the model's inputs, or says why it does
not fit and what to do. Nothing is ever unpickled.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from onnxcompress.calibration.arrays import (
    Array,
    LazyArray,
    Shards,
    open_npy,
    open_npz,
    shard_npz,
)
from onnxcompress.calibration.checks import LABELS, match_names
from onnxcompress.calibration.dataset import ArraySource, Dataset
from onnxcompress.calibration.images import ImageOptions, find_images, open_images
from onnxcompress.calibration.items import ItemSource, open_test_data, test_data_sets
from onnxcompress.calibration.synthetic import synthetic_dataset
from onnxcompress.errors import DataError, UsageError
from onnxcompress.interface import TensorSpec

__all__ = [
    "DataSource",
    "Dataset",
    "ImageOptions",
    "find_beside",
    "open_dataset",
    "synthetic_dataset",
]

DataSource: TypeAlias = (
    str | Path | Mapping[str, Array] | Array | Callable[[], Iterable[Mapping[str, Array]]]
)

_FUNCTION = re.compile(r"(?P<module>[A-Za-z_][\w.]*|.+\.py):(?P<function>[A-Za-z_]\w*)")


def find_beside(model_path: str | Path, role: Literal["calib", "eval"]) -> Path | None:
    """The data file that lies beside a model: ``digits.onnx`` has ``digits.calib.npz``.

    Returns:
        Its path; None when there is none.
    """
    beside = Path(model_path).with_suffix(f".{role}.npz")
    return beside if beside.is_file() else None


def open_dataset(
    source: DataSource,
    specs: Sequence[TensorSpec],
    *,
    labels: str | Path | Array | None = None,
    limit: int | None = None,
    image: ImageOptions | None = None,
) -> Dataset:
    """Open samples and check them against a model's inputs.

    Values are checked at once where the samples are stored as arrays, else as they are read.

    Args:
        source: A .npz or .npy file, a folder of them, a folder of images, ONNX test data, a
            ``module:function``, arrays in memory (by input name, or one array for one input), or a
            callable that gives feeds.
        specs: The model's inputs.
        labels: One entry per sample: an array, or a .npy file. Replaces labels found in the source.
        limit: Use only the first samples.
        image: How to turn image files into inputs.

    Raises:
        DataError: If the data cannot be read or do not fit the model.
        UsageError: If the source is not of a known form.
    """
    if not specs:
        raise DataError("the model has no inputs, so there is nothing to feed")
    if isinstance(source, str | Path):
        dataset = _from_path(source, specs, image)
    elif isinstance(source, np.ndarray):
        dataset = _from_arrays({"array": source}, specs, "an array in memory")
    elif isinstance(source, Mapping):
        arrays = {str(name): np.asarray(array) for name, array in source.items()}
        dataset = _from_arrays(arrays, specs, "arrays in memory")
    elif callable(source):
        name = getattr(source, "__qualname__", type(source).__name__)
        dataset = _from_callable(source, specs, f"function '{name}'")
    else:
        raise UsageError(
            f"data of type {type(source).__name__} cannot be used",
            hint="Give a path, 'module:function', arrays by input name, or a function.",
        )
    if labels is not None:
        dataset = _with_labels(dataset, labels)
    if limit is not None:
        dataset = dataset.take(limit)
    if dataset.stored:
        dataset.check()
    return dataset


def _from_path(
    source: str | Path, specs: Sequence[TensorSpec], image: ImageOptions | None
) -> Dataset:
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, specs, image)
    if path.is_file():
        label = f"'{path}'"
        if path.suffix == ".npz":
            return _from_arrays(open_npz(path), specs, label)
        if path.suffix == ".npy":
            return _from_arrays({path.stem: open_npy(path)}, specs, label)
        raise UsageError(
            f"'{path}' is not of a known data format",
            hint="Known: .npz, .npy, folders of these or of images, test_data_set_*, "
            "module:function.",
        )
    function = _FUNCTION.fullmatch(str(source))
    if function is None:
        raise DataError(
            f"'{source}' does not exist",
            hint="Give a file, a folder, or a Python function as 'module:function'.",
        )
    called = _import_function(function["module"], function["function"])
    return _from_callable(called, specs, f"'{source}'")


def _from_arrays(
    arrays: Mapping[str, LazyArray], specs: Sequence[TensorSpec], label: str
) -> Dataset:
    """A dataset of arrays, one of which may be the labels."""
    inputs = dict(arrays)
    labels = None
    if LABELS in inputs and all(spec.name != LABELS for spec in specs):
        found = inputs.pop(LABELS)
        if not found.shape or found.dtype.hasobject:
            raise DataError(f"{label}: '{LABELS}' must be an array with one entry per sample")
        labels = found[slice(0, found.shape[0])]
    objects = [name for name, array in inputs.items() if _holds_objects(array, specs)]
    if objects:
        raise DataError(
            f"{label}: array '{objects[0]}' holds Python objects",
            hint="Give plain numeric arrays of equal shape (numpy.stack the samples).",
        )
    chosen = match_names(list(inputs), specs, label)
    fed = {name: inputs[array] for name, array in chosen.items()}
    source = ArraySource(fed, specs, label)
    casts = "".join(
        f"; '{s.name}' {fed[s.name].dtype} fed as {s.dtype}"
        for s in specs
        if fed[s.name].dtype != s.dtype and fed[s.name].dtype.kind not in "USO"
    )
    return Dataset(source, specs, label + casts, labels=labels)


def _holds_objects(array: LazyArray, specs: Sequence[TensorSpec]) -> bool:
    """Whether an array has Python objects other than the strings a string input takes."""
    if not array.dtype.hasobject:
        return False
    if not isinstance(array, np.ndarray) or all(spec.dtype != np.dtype(object) for spec in specs):
        return True
    return not all(isinstance(element, str) for element in array.ravel())


def _from_callable(
    function: Callable[[], Iterable[Mapping[str, Array]]], specs: Sequence[TensorSpec], label: str
) -> Dataset:
    return Dataset(ItemSource(function, specs, label), specs, label)


def _from_folder(folder: Path, specs: Sequence[TensorSpec], image: ImageOptions | None) -> Dataset:
    label = f"'{folder}'"
    if tests := test_data_sets(folder):
        return Dataset(open_test_data(tests, specs, label), specs, label)
    if archives := sorted(folder.glob("*.npz")):
        return _from_arrays(shard_npz(archives), specs, f"{label}, {len(archives)} .npz files")
    if arrays := sorted(folder.glob("*.npy")):
        return _from_npy_folder(arrays, specs, f"{label}, {len(arrays)} .npy files")
    if images := find_images(folder):
        opened, labels = open_images(folder, images, specs, image)
        return Dataset(opened, specs, opened.description, labels=labels)
    raise DataError(
        f"folder {label} holds no data",
        hint="Expected .npz, .npy or image files, or test_data_set_* folders with input_*.pb.",
    )


def _from_npy_folder(paths: Sequence[Path], specs: Sequence[TensorSpec], label: str) -> Dataset:
    """One file per input, named after it; or, for a model of one input, any number of pieces."""
    stems = [path.stem for path in paths if path.stem != LABELS]
    names = {spec.name for spec in specs}
    if len(specs) > 1 or set(stems) == names:
        return _from_arrays({path.stem: open_npy(path) for path in paths}, specs, label)
    pieces: dict[str, LazyArray] = {
        specs[0].name: Shards([(f"'{p}'", open_npy(p)) for p in paths if p.stem != LABELS])
    }
    for path in paths:
        if path.stem == LABELS:
            pieces[LABELS] = open_npy(path)
    return _from_arrays(pieces, specs, label)


def _with_labels(dataset: Dataset, labels: str | Path | Array) -> Dataset:
    if isinstance(labels, str | Path):
        path = Path(labels)
        if path.suffix != ".npy":
            raise UsageError(
                f"labels '{path}' are not a .npy file", hint="Save them with numpy.save."
            )
        stored = open_npy(path)
        if not stored.shape:
            raise DataError(f"labels '{path}' are a scalar, not one entry per sample")
        labels = stored[slice(0, stored.shape[0])]
    return dataset.with_labels(np.asarray(labels))


def _import_function(module: str, function: str) -> Callable[[], Iterable[Mapping[str, Array]]]:
    """Import ``module:function``; the current folder is importable, and so is ``file.py:function``.

    Raises:
        DataError: If importing fails or there is no such function.
    """
    folder, name = Path.cwd(), module
    if module.endswith(".py"):
        path = Path(module).resolve()
        if not path.is_file():
            raise DataError(f"'{module}' does not exist")
        folder, name = path.parent, path.stem
    with _importable(folder):
        try:
            imported = importlib.import_module(name)
        except (Exception, SystemExit) as error:
            raise DataError(
                f"module '{module}' cannot be imported: {type(error).__name__}: {error}",
                hint="It must lie in the current folder or be installed.",
            ) from error
    found = getattr(imported, function, None)
    if not callable(found):
        raise DataError(
            f"module '{module}' has no function '{function}'",
            hint="Name a function without arguments that gives one dict of arrays per sample.",
        )

    def called() -> Iterable[Mapping[str, Array]]:
        given = found()
        if not isinstance(given, Iterable):
            raise TypeError(f"it gave a {type(given).__name__}, nothing to iterate over")
        return given

    return called


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)
