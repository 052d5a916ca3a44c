"""Choosing samples out of a set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytest

from onnxcompress.calibration.dataset import Dataset
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.errors import DataError
from onnxcompress.interface import TensorSpec
from tests.builder import Array

SPECS = (TensorSpec("x", np.dtype(np.float32), ("batch", 2)),)


def rows(dataset: Dataset, size: int = 4) -> list[float]:
    return [float(v) for b in dataset.batches(size) for v in b["x"][:, 0]]


def stored(count: int) -> Dataset:
    values = np.arange(count, dtype=np.float32)[:, None].repeat(2, axis=1)
    return open_dataset({"x": values}, SPECS, labels=np.arange(count))


def one_by_one(count: int) -> Dataset:
    def items() -> Iterator[Mapping[str, Array]]:
        for number in range(count):
            yield {"x": np.full((1, 2), number, np.float32)}

    return open_dataset(items, SPECS)


@pytest.mark.parametrize("make", [stored, one_by_one])
def test_spread_takes_even_steps_over_the_whole_set(make: object) -> None:
    assert callable(make)
    dataset = make(20)
    assert rows(dataset.spread(5)) == [0, 4, 8, 12, 16]
    assert rows(dataset.spread(30)) == list(range(20))
    assert rows(dataset.skip(10).spread(3)) == [10, 13, 16]


@pytest.mark.parametrize("make", [stored, one_by_one])
def test_divide_keeps_every_sample_once(make: object) -> None:
    assert callable(make)
    most, held_out = make(10).divide(4)
    assert rows(most) == [0, 1, 2, 4, 5, 6, 8, 9]
    assert rows(held_out) == [3, 7]
    assert rows(most.spread(4)) == [0, 2, 5, 8]


def test_batches_are_full_and_labels_follow() -> None:
    chosen = stored(21).spread(10)
    assert [len(b["x"]) for b in chosen.batches(4)] == [4, 4, 2]
    assert chosen.labels is not None
    assert [float(v) for v in chosen.labels] == rows(chosen)


def test_samples_of_different_shapes_do_not_share_a_batch() -> None:
    specs = (TensorSpec("x", np.dtype(np.float32), ("batch", "length")),)

    def items() -> Iterator[Mapping[str, Array]]:
        for number in range(8):
            yield {"x": np.full((1, 1 + number // 4), number, np.float32)}

    chosen = open_dataset(items, specs).spread(4)
    assert [b["x"].shape for b in chosen.batches(4)] == [(2, 1), (2, 2)]


def test_nothing_left_is_an_error() -> None:
    with pytest.raises(DataError, match="0 samples left"):
        stored(4).spread(0)
