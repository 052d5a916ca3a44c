"""What rates whole models looks at what counts of their outputs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.calibration.sources import Dataset, open_dataset
from onnxcompress.interface import input_specs
from onnxcompress.passes.quant.judge import Judge
from tests.builder import ModelBuilder


def _scaled(*factors: float) -> ir.Model:
    """Columns of [n, length] times factors, the last of which is for all columns behind."""
    b = ModelBuilder("scaled")
    x = b.input("x", ["n", "length"])
    whole = np.ones((1, 5), np.float32)
    whole[0, : len(factors)] = factors
    columns = b.op("Shape", x, start=1, end=2)
    scale = b.op("Slice", b.constant(whole), b.constant([0]), columns, b.constant([1]))
    b.output(b.op("Mul", x, scale))
    model = b.build()
    model_io.normalize(model)
    return model


def _data(columns: int, rows: int = 20) -> Dataset:
    x = np.random.default_rng(0).normal(size=(rows, 5)).astype(np.float32)[:, :columns]
    return open_dataset({"x": np.ascontiguousarray(x)}, input_specs(_scaled()))


@pytest.mark.parametrize(
    ("factors", "near"), [((1, 1, 1, 9, 9), True), ((1, 1, 2, 1, 1), False), ((1,) * 5, True)]
)
def test_filling_is_run_but_not_compared(factors: tuple[float, ...], near: bool) -> None:
    judge = Judge(_scaled(), _data(3), filled=_data(5))
    assert (judge.rate(_scaled(*factors)).sqnr_db > 100) is near


def test_samples_are_compared_in_batches_where_the_model_takes_them() -> None:
    b = ModelBuilder("widest")  # each result depends on the largest value of the batch
    x = b.input("x", ["n", "length"])
    b.output(b.op("Div", x, b.op("ReduceMax", x, keepdims=0)))
    widest = b.build()
    b = ModelBuilder("widest_of_each")
    x = b.input("x", ["n", "length"])
    b.output(b.op("Div", x, b.op("ReduceMax", x, axes=[1], keepdims=1)))
    each = b.build()
    for model in (widest, each):
        model_io.normalize(model)
    alone, together = Judge(each, _data(5, 1)), Judge(each, _data(5))
    assert alone.rate(widest).sqnr_db > 100
    assert together.rate(widest).sqnr_db < 20
    assert together.rate(each).sqnr_db > 100
