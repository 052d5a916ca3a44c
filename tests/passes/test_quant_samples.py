"""How many samples are looked at, by the work that each is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcompress import model_io
from onnxcompress.calibration.synthetic import synthetic_dataset
from onnxcompress.context import PassContext
from onnxcompress.passes.quant.correction import Correction, Quantized, correct_biases
from onnxcompress.passes.quant.samples import (
    few_samples,
    macs_of,
    mix_bounds,
    parted_samples,
    samples_for,
)
from tests.builder import ModelBuilder
from tests.fixtures import fixture
from tests.running import context


@given(st.integers(1, 10**12), st.integers(1, 2000))
def test_all_mixes_together_are_bounded_work(macs: int, available: int) -> None:
    samples, looks = mix_bounds(macs, available)
    assert 1 <= samples <= available
    assert looks >= 4
    least = 4 * min(4, available) * macs
    assert samples * looks * macs <= max(6e11, least)


def test_small_models_are_looked_at_on_all_samples_as_often_as_ever() -> None:
    samples, looks = mix_bounds(40_000_000, 200)
    assert samples == 200
    assert looks > 60


def test_more_work_per_sample_never_means_more_samples() -> None:
    counts = [samples_for(48, 5e10, 10**k) for k in range(13)]
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (48, 4)


def test_work_is_counted_per_sample_at_the_shapes_of_the_data() -> None:
    b = ModelBuilder("product")
    x = b.input("x", ["n", 8])
    b.output(b.op("MatMul", x, b.constant(np.ones((8, 4), np.float32))))
    model = b.build()
    model_io.normalize(model)
    assert macs_of(model, synthetic_dataset(model, samples=3, seed=0)) == 32
    assert macs_of(model, None) == 1


def test_biases_corrected_on_parts_are_those_of_the_whole(tmp_path: Path) -> None:
    model = fixture("conv_chain").build()
    model_io.normalize(model)
    ctx = context(tmp_path, synthetic_dataset(model, samples=48, seed=0))
    few, rest, share = parted_samples(ctx)
    assert few.calibration is not None
    assert rest.calibration is not None
    assert (few.calibration.sample_count, rest.calibration.sample_count) == (16, 32)
    assert share == pytest.approx(2 / 3)
    compared = few_samples(ctx).calibration
    assert compared is not None
    for same, other in zip(few.calibration.batches(4), compared.batches(4), strict=True):
        assert all(np.array_equal(array, other[name]) for name, array in same.items())
    noisy = model_io.clone(model)
    node = next(n for n in noisy.graph if n.op_type == "Conv")
    weight = node.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    scaled = weight.const_value.numpy() * np.float32(1.1)
    weight.const_value = ir.tensor(scaled, name=weight.name)
    first = node.name or ""

    def correction(job: PassContext) -> Correction:
        return correct_biases(job, model, Quantized(noisy, {}), {first: 1})

    whole, joined = correction(ctx), correction(few).joined(correction(rest), share)
    assert np.abs(whole.shifts[first]).max() > 1e-3
    np.testing.assert_allclose(joined.shifts[first], whole.shifts[first], rtol=1e-4, atol=1e-6)
    for name, db in whole.output_sqnr_db.items():
        assert joined.output_sqnr_db[name] == pytest.approx(db, abs=0.5)


def test_all_there_are_are_few(tmp_path: Path) -> None:
    model = fixture("conv_chain").build()
    ctx = context(tmp_path, synthetic_dataset(model, samples=9, seed=0))
    few, _, share = parted_samples(ctx)
    assert few is ctx
    assert share == 0.0
