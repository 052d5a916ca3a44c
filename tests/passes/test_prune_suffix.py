"""Measuring changes of a few layers by running only what lies behind them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.interface import input_specs
from onnxcompress.passes.prune.consumers import Layers
from onnxcompress.passes.prune.probe import Errors, OutputProbe
from onnxcompress.passes.prune.suffix import SuffixProbe
from tests.builder import Array, ModelBuilder
from tests.fixtures import fixture
from tests.running import context

CASES = ("residual_bn", "inception_concat", "grouped_shuffle", "mlp_matmul", "two_outputs")


def changed(model: ir.Model, name: str, seed: int) -> Array:
    """An initializer with noise added."""
    array = constant_of(model.graph.initializers[name])
    assert array is not None
    noise = np.random.default_rng(seed).normal(size=array.shape)
    new: Array = (array + noise * array.std()).astype(array.dtype)
    return new


@pytest.mark.parametrize("case", CASES)
def test_the_part_behind_a_layer_errs_as_the_whole_model_does(case: str, tmp_path: Path) -> None:
    model = fixture(case).build()
    model_io.normalize(model)
    rng = np.random.default_rng(0)
    feeds = {
        s.name: rng.normal(size=[12, *(int(d) for d in (s.shape or ())[1:])]).astype(s.dtype)
        for s in input_specs(model)
    }
    data = open_dataset(feeds, input_specs(model))
    job = context(tmp_path, data)
    whole = OutputProbe(model, data, job)
    found = {
        i: ((c.node,), (c.weight,))
        for i, c in enumerate(Layers.of(model).consumers.values())
        if not c.shared
    }
    measured = 0
    with SuffixProbe(model, whole, job, found) as probe:
        for group, (_, (weight,)) in found.items():
            suffix = probe.at(group)
            for seed in (1, 2):
                new = changed(model, weight, seed)
                variant = model_io.clone(model)
                set_initializer(variant.graph, weight, new)
                error = whole.error_of(variant)
                part = probe.part(group)
                if part is not None:
                    set_initializer(part.graph, weight, new)
                    assert probe.error_of(group, part) == pytest.approx(error, rel=1e-3)
                if suffix is None:  # no floating-point output depends on it
                    assert error == 0.0
                    assert part is None
                else:
                    assert suffix.error_of({weight: new}) == pytest.approx(error, rel=1e-3)
                    measured += 1
    assert measured


def test_layers_without_weights_or_without_a_way_to_the_outputs_are_left_out(
    tmp_path: Path,
) -> None:
    b = ModelBuilder("aside")
    x = b.input("x", ["batch", 4])
    y = b.op("MatMul", x, b.weight(4, 3, name="used"))
    b.output(
        b.op("ArgMax", b.op("MatMul", x, b.weight(4, 3, name="integers")), axis=1),
        ["batch", 1],
        np.int64,
    )
    b.output(y, ["batch", 3])
    model = b.build()
    model_io.normalize(model)
    nodes = {n.inputs[1].name: n.name or "" for n in model.graph if n.op_type == "MatMul"}  # type: ignore[union-attr]
    data = open_dataset({"x": np.ones((8, 4), np.float32)}, input_specs(model))
    job = context(tmp_path, data)
    layers = {
        0: ((), ()),
        1: ((nodes["used"],), ("used",)),
        2: ((nodes["integers"],), ("integers",)),
    }
    with SuffixProbe(model, OutputProbe(model, data, job), job, layers) as probe:
        assert [probe.at(i) is not None for i in range(3)] == [False, True, False]


def test_an_output_that_is_left_out_has_no_error() -> None:
    errors = Errors([{"a": np.ones(4), "b": np.full(4, 2.0)}, {"a": np.ones(2), "b": np.ones(2)}])
    assert errors.of([{}, {}]) == 0.0
    assert errors.of([{"a": np.zeros(4)}, {"a": np.zeros(2)}]) == pytest.approx(0.5)
    assert errors.of([{"a": np.full(4, np.inf)}, {}]) == 1.0
