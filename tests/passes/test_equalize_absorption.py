"""Absorbed biases shorten ranges and leave the outputs of the calibration samples as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxcompress import model_io
from onnxcompress.calibration.sources import Dataset, open_dataset
from onnxcompress.calibration.statistics import RangeRequest
from onnxcompress.calibration.synthetic import synthetic_dataset
from onnxcompress.errors import DataError
from onnxcompress.graph.naming import Namer
from onnxcompress.interface import input_specs
from onnxcompress.passes.equalize import EqualizeOptions, EqualizePass
from onnxcompress.passes.equalize.absorption import absorb, pairs_of
from onnxcompress.targets import target_by_name
from tests.builder import ModelBuilder
from tests.fixtures import RUNNABLE, Fixture
from tests.running import context, interface, largest_error, run_model


def _lifted(seed: int, *, padded: bool, groups: int = 1) -> tuple[ir.Model, Dataset]:
    """Conv, Relu, Conv, Relu, Conv; biases of half the channels keep them far above 0."""
    rng = np.random.default_rng(seed)
    b = ModelBuilder("lifted")
    x = b.input("x", ["n", 3, 9, 9])
    pads = [1, 1, 1, 1] if padded else [0, 0, 0, 0]
    for number, (inputs, outputs, group) in enumerate(((3, 8, 1), (8, 8, groups), (8, 4, 1))):
        weight = rng.normal(size=(outputs, inputs // group, 3, 3)).astype(np.float32) / 5
        bias = np.where(np.arange(outputs) % 2, 0, rng.uniform(5, 20, outputs)).astype(np.float32)
        arrays = b.constant(weight), b.constant(bias)
        x = b.op("Conv", x, *arrays, pads=pads if number else [0, 0, 0, 0], group=group)
        if number < 2:
            x = b.op("Relu", x)
    b.output(x)
    model = b.build()
    model_io.normalize(model)
    samples = rng.normal(size=(12, 3, 9, 9)).astype(np.float32)
    return model, open_dataset({"x": samples}, input_specs(model))


@given(seed=st.integers(0, 1000), groups=st.sampled_from([1, 2, 8]))
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_the_function_stays_and_ranges_shrink(seed: int, groups: int, tmp_path: Path) -> None:
    model, data = _lifted(seed, padded=False, groups=groups)
    reference, job = model_io.clone(model), context(tmp_path, data)
    pairs, skips = pairs_of(model)
    absorbed = absorb(model, job, pairs, Namer(model))
    assert not skips
    assert absorbed
    for a in absorbed:
        assert 0 < a.channels <= 8
        assert a.after <= a.before
    feeds = next(data.batches(12))
    assert largest_error(run_model(model, feeds), run_model(reference, feeds)) < 1e-5
    # What is absorbed leaves no channel above 0 by more than its spread.
    values = [pair.source.node.outputs[0].name or "" for pair in pairs]
    for value in values:
        before, after = (
            job.collect(m, [RangeRequest(value, axis=1)])[RangeRequest(value, axis=1)]
            for m in (reference, model)
        )
        spread = before.maximum - before.minimum
        np.testing.assert_allclose(after.maximum - after.minimum, spread, rtol=1e-3, atol=1e-4)
        assert (after.minimum <= before.minimum + 1e-5).all()


def test_padding_and_other_readers_are_skipped_with_their_reason(tmp_path: Path) -> None:
    model, _ = _lifted(0, padded=True)
    pairs, skips = pairs_of(model)
    assert not pairs
    assert all("pads with zeros, which it would shift" in s.reason for s in skips)
    assert len(skips) == 2
    b = ModelBuilder("residual")
    x = b.op("Relu", b.conv(b.input("x", ["n", 4, 8, 8]), 4, 4, 1))
    b.output(b.op("Add", x, b.conv(x, 4, 4, 1)))
    _, (skip,) = pairs_of(b.build())
    assert "Add" in skip.reason
    assert "has no bias to take them" in skip.reason


@pytest.mark.parametrize("case", RUNNABLE, ids=str)
def test_no_model_changes_what_it_computes(case: Fixture, tmp_path: Path) -> None:
    model = case.build()
    model_io.normalize(model)
    reference, before = model_io.clone(model), interface(model)
    data = synthetic_dataset(reference, samples=4, seed=0)
    report = EqualizePass(EqualizeOptions(absorb=True)).run(model, context(tmp_path, data))
    model_io.check(model)
    assert interface(model) == before
    assert "layers_absorbed" in report.figures
    feeds = next(data.batches(4))
    tolerance = 1e-2 if case.name == "half_precision" else 1e-4
    assert largest_error(run_model(model, feeds), run_model(reference, feeds)) < tolerance


def test_absorption_says_that_it_needs_data(tmp_path: Path) -> None:
    model, _ = _lifted(0, padded=False)
    target = target_by_name("generic")
    assert EqualizePass(EqualizeOptions(absorb=True)).needs_for(target)
    assert not EqualizePass().needs_for(target)
    with pytest.raises(DataError):
        EqualizePass(EqualizeOptions(absorb=True)).run(model, context(tmp_path))
