"""What the readers of a layer make of errors in its outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.interface import input_specs
from onnxcompress.passes.svd import SvdOptions, SvdPass
from onnxcompress.passes.svd.importance import output_metrics
from onnxcompress.passes.svd.sites import find_sites
from tests.builder import ModelBuilder
from tests.fixtures import RUNNABLE
from tests.running import context, run_model


def read_by_few() -> ir.Model:
    """Six outputs per position, of which the reader looks at two."""
    b = ModelBuilder("svd_readers")
    x = b.input("x", ["batch", 8, 4, 4])
    y = b.op("MaxPool", b.op("Relu", b.conv(x, 8, 6, 1)), kernel_shape=[2, 2], strides=[2, 2])
    weight = b.rng.normal(size=(6, 4, 5)).astype(np.float32)
    weight[[0, 1, 3, 4]] *= 0.01
    b.output(b.op("MatMul", b.op("Flatten", y), b.constant(weight.reshape(24, 5))))
    model = b.build()
    model_io.normalize(model)
    return model


def test_outputs_count_as_their_readers_weigh_them() -> None:
    model = read_by_few()
    sites = find_sites(model, SvdOptions()).sites
    metrics = output_metrics(model, sites)
    (site,) = metrics  # the last layer is an output of the model: nothing is known of its readers
    assert site.op_type == "Conv"
    matrix = metrics[site].root @ metrics[site].root
    importance = np.diag(matrix)
    assert importance[[2, 5]].min() > 2 * importance[[0, 1, 3, 4]].max()
    weight = model.graph.initializers[sites[-1].weight].const_value
    assert weight is not None
    rows = weight.numpy().astype(float).reshape(6, -1)
    gram = rows @ rows.T
    np.testing.assert_allclose(matrix, gram / np.trace(gram) * 6 + np.eye(6), atol=1e-6)


def test_the_metric_lowers_the_error_of_the_model(tmp_path: Path) -> None:
    model = read_by_few()
    random = np.random.default_rng(0)
    feeds = {"x": random.normal(size=(64, 8, 4, 4)).astype(np.float32)}
    data = open_dataset(feeds, input_specs(model))
    first = find_sites(model, SvdOptions()).sites[0]
    result = model_io.clone(model)
    options = SvdOptions(rank=(f"{first.node}:2",), align=1, recover=False)
    SvdPass(options).run(result, context(tmp_path, data))
    (found,), (expected,) = (tuple(run_model(m, feeds).values()) for m in (result, model))
    missed = found.astype(float) - expected.astype(float)
    # Two of the six outputs hold nearly all that is read, and rank 2 keeps them.
    assert np.mean(missed**2) < 0.05 * np.var(expected.astype(float))


def test_every_fixture_has_finite_metrics() -> None:
    known = 0
    for case in RUNNABLE:
        model = case.build()
        model_io.normalize(model)
        for site, metric in output_metrics(model, find_sites(model, SvdOptions()).sites).items():
            known += 1
            assert metric.root.shape == (site.kernel.outputs,) * 2
            assert np.isfinite(metric.inverse).all()
    assert known > 20
