"""BatchNormalization behind pruned layers: statistics estimated anew."""

from __future__ import annotations

from pathlib import Path

import hypothesis.extra.numpy as hnp
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress import model_io
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.interface import input_specs
from onnxcompress.passes.prune import PruneOptions, PrunePass
from onnxcompress.passes.prune.norms import matched
from tests.builder import Array, ModelBuilder
from tests.running import context, run_model

Floats = npt.NDArray[np.float64]


def numbers(low: float, high: float) -> st.SearchStrategy[Floats]:
    return hnp.arrays(np.float64, 5, elements=st.floats(low, high))


@settings(max_examples=60, deadline=None)
@given(numbers(-3, 3), numbers(0.1, 9), numbers(-2, 2), numbers(0.3, 3), st.integers(0, 2**32 - 1))
def test_outputs_have_the_mean_and_variance_they_had(
    mean: Floats, variance: Floats, shift: Floats, scale: Floats, seed: int
) -> None:
    before = np.random.default_rng(seed).normal(size=(40, 5))
    now = before * scale + shift
    found = matched(mean, variance, (before.mean(0), before.var(0)), (now.mean(0), now.var(0)))
    # The new input is an affine image of the old one here, so the outputs are the same.
    old = (before - mean) / np.sqrt(variance)
    np.testing.assert_allclose((now - found[0]) / np.sqrt(found[1]), old, atol=1e-9)


def test_channels_without_signal_keep_their_statistics() -> None:
    mean, variance = np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0])
    before = np.zeros(3), np.array([1.0, 0.0, 1.0])
    now = np.ones(3), np.array([1.0, 1.0, 1e-9])
    found = matched(mean, variance, before, now)
    assert found[0].tolist() == [2.0, 2.0, 3.0]
    assert found[1].tolist() == [4.0, 5.0, 6.0]


def network(folder: Path) -> tuple[ir.Model, dict[str, Array]]:
    """A narrow convolution, ReLU, then a normalization that nothing can be folded into."""
    b = ModelBuilder("norm")
    y = b.op("Relu", b.conv(b.input("x", ["batch", 4, 8, 8]), 4, 24))
    y = b.op("Relu", b.conv(y, 24, 12))
    y = b.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])
    b.output(b.op("Tanh", b.batch_norm(y, 12)))
    model = b.build()
    model_io.normalize(model)
    rng = np.random.default_rng(0)
    feeds: dict[str, Array] = {"x": rng.normal(size=(64, 4, 8, 8)).astype(np.float32)}
    return model, feeds


def normalization(model: ir.Model) -> ir.Node:
    return next(n for n in model.graph if n.op_type == "BatchNormalization")


@pytest.mark.parametrize("recover", [True, False])
def test_pruning_estimates_them_anew(recover: bool, tmp_path: Path) -> None:
    model, feeds = network(tmp_path)
    result = model_io.clone(model)
    first = next(n.name or "" for n in model.graph if n.op_type == "Conv")
    options = PruneOptions(align=1, keep=(f"{first}:0.3",), rounds=1, recover=recover)
    data = open_dataset(feeds, input_specs(model))
    report = PrunePass(options).run(result, context(tmp_path, data))
    assert any("estimated anew" in c.what for c in report.changes) is recover

    def moments(network: ir.Model) -> tuple[Floats, Floats]:
        copy = model_io.clone(network)
        node = normalization(copy)
        value = node.outputs[0]
        copy.graph.outputs.clear()
        copy.graph.outputs.append(value)
        (rows,) = run_model(copy, feeds).values()
        rows = rows.astype(np.float64)
        return rows.mean(axis=(0, 2, 3)), rows.var(axis=(0, 2, 3))

    (mean, variance), (old_mean, old_variance) = moments(result), moments(model)
    close = np.allclose(mean, old_mean, atol=0.01) and np.allclose(
        variance, old_variance, rtol=0.02
    )
    assert close is recover
