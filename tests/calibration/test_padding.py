"""Padding is left out where a mask marks it and the model ignores it, and only there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.calibration.padding import without_padding
from onnxcompress.calibration.sources import Dataset, open_dataset
from onnxcompress.interface import input_specs
from onnxcompress.runtime import open_session
from onnxcompress.verification.side_by_side import verify_models
from tests.builder import ModelBuilder
from tests.running import SETTINGS

_LENGTHS = (3, 5, 5, 9, 1)


def _attention(*, masked: bool) -> ir.Model:
    """Attention over token embeddings, whose mask is obeyed or only added to the output."""
    b = ModelBuilder("masked" if masked else "ignored")
    ids = b.input("ids", ["batch", "length"], np.int64)
    mask = b.input("keep", ["batch", "length"], np.int64)
    x = b.op("Gather", b.weight(20, 8), ids)
    keep = b.op("Unsqueeze", b.op("Cast", mask, to=1), b.constant([1]))
    scores = b.op("MatMul", b.linear(x, 8, 8), b.op("Transpose", x, perm=[0, 2, 1]))
    if masked:
        off = b.op("Mul", b.op("Sub", b.constant(1.0), keep), b.constant(-1e9))
        scores = b.op("Add", scores, off)
    y = b.op("MatMul", b.op("Softmax", scores, axis=-1), x)
    if not masked:
        y = b.op("Add", y, b.op("Transpose", keep, perm=[0, 2, 1]))
    b.output(b.linear(y, 8, 4))
    model = b.build()
    model_io.normalize(model)
    return model


def _data(model: ir.Model, *, left: bool = False) -> Dataset:
    rng = np.random.default_rng(0)
    mask = np.array([[1] * n + [0] * (9 - n) for n in _LENGTHS])
    ids = rng.integers(0, 20, mask.shape)
    return open_dataset(
        {"ids": ids, "keep": mask[:, ::-1].copy() if left else mask}, input_specs(model)
    )


def _cut(model: ir.Model, data: Dataset) -> Dataset | None:
    return without_padding(data, lambda: open_session(model, SETTINGS).run)


def test_samples_are_cut_behind_their_last_token() -> None:
    model = _attention(masked=True)
    data = _data(model).with_labels(np.arange(len(_LENGTHS)))
    cut = _cut(model, data)
    assert cut is not None
    assert cut.sample_count == data.sample_count
    batches = list(cut.batches(8))
    assert [b["ids"].shape for b in batches] == [(1, 3), (2, 5), (1, 9), (1, 1)]
    assert all((b["keep"] == 1).all() for b in batches)
    whole = np.concatenate([b["ids"].reshape(-1) for b in batches])
    rows = next(iter(data.batches(8)))["ids"]
    expected = np.concatenate([row[:n] for row, n in zip(rows, _LENGTHS, strict=True)])
    np.testing.assert_array_equal(whole, expected)


def test_samples_of_one_length_come_together_where_order_does_not_matter() -> None:
    model = _attention(masked=True)
    rng = np.random.default_rng(0)
    lengths = np.array([4, 2, 4, 9, 2, 4, 4])
    ids = rng.integers(0, 20, (len(lengths), 9))
    mask = (np.arange(9) < lengths[:, None]).astype(np.int64)
    cut = _cut(model, open_dataset({"ids": ids, "keep": mask}, input_specs(model)))
    assert cut is not None
    batches = list(cut.batches(3))
    assert [b["ids"].shape for b in batches] == [(2, 2), (3, 4), (1, 4), (1, 9)]
    np.testing.assert_array_equal(batches[1]["ids"], ids[[0, 2, 5], :4])
    assert [b["ids"].shape[1] for b in cut.batches(1)] == list(lengths)  # one by one: in order
    assert sum(len(b["ids"]) for b in cut.take(4).batches(8)) == 4


def test_verification_compares_what_counts(tmp_path: Path) -> None:
    model = _attention(masked=True)
    path = tmp_path / "model.onnx"
    model_io.save(model, path)
    checked = verify_models(path, path, _data(model), measure=False)
    assert checked.passed
    assert checked.data.endswith("(padding left out)")


@pytest.mark.parametrize("masked", [True, False])
def test_inputs_that_are_no_mask_change_nothing(masked: bool) -> None:
    model = _attention(masked=masked)
    data = _data(model, left=masked)
    assert _cut(model, data) is None
