"""Statistics taken stage by stage, beside those that read the whole networks each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.calibration.statistics import REFERENCE_PREFIX, CrossMomentsRequest
from onnxcompress.context import PassContext
from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.interface import input_specs
from onnxcompress.passes import _staged
from onnxcompress.passes._staged import Staged
from onnxcompress.passes.prune.consumers import Consumer, Layers
from onnxcompress.passes.prune.samples import split
from onnxcompress.passes.prune.stream import Stream
from tests.fixtures import fixture
from tests.running import context

CASES = (
    "residual_bn",
    "inception_concat",
    "grouped_shuffle",
    "mlp_matmul",
    "primitive_transformer",
)


def job_of(case: str, work_dir: Path) -> tuple[ir.Model, PassContext]:
    model = fixture(case).build()
    model_io.normalize(model)
    rng = np.random.default_rng(0)
    feeds = {}
    for spec in input_specs(model):
        shape = [24, *(d if isinstance(d, int) else 6 for d in (spec.shape or ())[1:])]
        integer = spec.dtype.kind == "i"
        drawn = rng.integers(0, 4, shape) if integer else rng.normal(size=shape)
        feeds[spec.name] = drawn.astype(spec.dtype)
    return model, context(work_dir, open_dataset(feeds, input_specs(model)))


def request_of(layer: Consumer) -> CrossMomentsRequest:
    target = ((REFERENCE_PREFIX + layer.output, 1.0),)
    return CrossMomentsRequest(layer.data, layer.unfold, target, layer.target_axis, 64)


def noisy(model: ir.Model, name: str) -> None:
    array = constant_of(model.graph.initializers[name])
    assert array is not None
    noise = np.random.default_rng(1).normal(size=array.shape) * array.std()
    set_initializer(model.graph, name, (array + noise).astype(array.dtype))


@pytest.mark.parametrize("case", CASES)
def test_stages_measure_what_whole_runs_do(case: str, tmp_path: Path) -> None:
    model, job = job_of(case, tmp_path)
    layers = [c for c in Layers.of(model).consumers.values() if not c.obstacle and not c.shared]
    assert job.calibration is not None
    assert len(layers) > 1
    parts = [part for part in split(job.calibration) if part is not None]
    reference = model_io.clone(model)
    steps = [[request_of(layer)] for layer in layers]
    with Staged(model, reference, steps, [c.weight for c in layers], parts, job) as staged:
        for number, layer in enumerate(layers):
            found = staged.measure(number, "measuring")
            for part, own in zip(parts, found, strict=True):
                apart = PassContext(
                    target=job.target, work_dir=tmp_path, calibration=part, session=job.session
                )
                whole = apart.collect(model, steps[number], reference=reference)
                expected, got = whole[steps[number][0]], own[steps[number][0]]
                assert got.count == expected.count
                scale = np.abs(expected.cross).max() + 1e-6
                np.testing.assert_allclose(got.cross, expected.cross, atol=1e-4 * scale)
                np.testing.assert_allclose(
                    got.covariance, expected.covariance, atol=1e-4 * np.abs(got.covariance).max()
                )
            for changed in (staged.model, model):
                noisy(changed, layer.weight)


def test_batches_are_halved_where_memory_does_not_suffice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, job = job_of("mlp_matmul", tmp_path)
    layers = list(Layers.of(model).consumers.values())
    sizes = []

    class Small(Stream):
        def advance(self, count: int, description: str) -> None:
            sizes.append(self._size)
            if self._size > 2:
                raise MemoryError
            super().advance(count, description)

    monkeypatch.setattr(_staged, "Stream", Small)
    assert job.calibration is not None
    steps = [[request_of(layers[0])]]
    with Staged(model, model, steps, [], [job.calibration], job) as staged:
        (found,) = staged.measure(0, "measuring")
    assert sizes == [8, 4, 2]
    whole = job.collect(model, steps[0], reference=model)[steps[0][0]]
    np.testing.assert_allclose(found[steps[0][0]].cross, whole.cross, rtol=1e-3, atol=1e-5)
