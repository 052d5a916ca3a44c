from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.calibration.sources import Dataset, open_dataset
from onnxcompress.graph.constants import constant_of
from onnxcompress.interface import input_specs
from onnxcompress.passes.base import PassReport
from onnxcompress.passes.share import (
    Assign,
    Packing,
    ShareOptions,
    SharePass,
    halves,
    share_pass,
)
from onnxcompress.passes.share.halves import rest_of
from onnxcompress.runtime import optimized_graph
from tests.builder import ModelBuilder
from tests.fixtures import fixture
from tests.running import SETTINGS, context, run_model

HERE = Path()  # the fixture below makes it a temporary folder


@pytest.fixture(autouse=True)
def _in_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def separable(channels: int = 128, *, large: float = 1.0) -> ir.Model:
    """A depthwise convolution between two pointwise ones, all with biases."""
    b = ModelBuilder("separable")
    x = b.conv(b.input("x", ["N", 32, 6, 6]), 32, channels, 1)
    x = b.conv(b.op("Relu", x), channels, channels, groups=channels)
    bias = b.constant(np.full((1, channels, 1, 1), large, np.float32), "offset")
    b.output(b.conv(b.op("Relu", b.op("Add", x, bias)), channels, 512, 1))
    model = b.build()
    model_io.normalize(model)
    return model


def samples(model: ir.Model, count: int = 32) -> Dataset:
    data = np.random.default_rng(4).normal(size=(count, 32, 6, 6)).astype(np.float32)
    return open_dataset({"x": data}, input_specs(model))


def share(model: ir.Model, how: ShareOptions, data: Dataset | None = None) -> PassReport:
    return SharePass(how).run(model, context(HERE, data))


def in_half(report: PassReport) -> set[str]:
    return {c.node for c in report.changes if "half precision" in c.what}


def size(model: ir.Model) -> int:
    model_io.save(model, HERE / "out.onnx")
    return (HERE / "out.onnx").stat().st_size


@pytest.mark.parametrize(
    "name", ["conv_chain", "residual_bn", "grouped_shuffle", "lstm", "if_model", "loop_model"]
)
def test_halves_are_computed_at_load(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share_pass, "stored_size", lambda *_: 0)  # codes for small weights, too
    monkeypatch.setattr(halves, "halves_save", lambda _: True)
    model = fixture(name).build()
    model_io.normalize(model, min_opset=21)
    before = operators(model)
    report = share(model, ShareOptions(assign=Assign.NEAREST, bits=2, min_elements=16))
    assert in_half(report)
    model_io.infer_shapes(model)
    model_io.check(model)
    assert operators(model) == before


def operators(model: ir.Model) -> Counter[str]:
    executed = optimized_graph(model, SETTINGS, HERE)
    return Counter(node.op_type for node in executed.graph.all_nodes())


def test_biases_are_stored_in_half_where_codes_lose_more() -> None:
    model = separable()
    sizes, errors = [], []
    feeds = {"x": np.random.default_rng(5).normal(size=(8, 32, 6, 6)).astype(np.float32)}
    (expected,) = run_model(model, feeds).values()
    for wanted in (False, True):
        copy = model.clone()
        report = share(copy, ShareOptions(halves=wanted), samples(model))
        assert bool(in_half(report)) == wanted
        sizes.append(size(copy))
        (found,) = run_model(copy, feeds).values()
        errors.append(float(np.sum((found.astype(float) - expected) ** 2)))
    assert sizes[1] <= sizes[0] - 2 * (128 + 128 + 512) + 40 * 3
    assert errors[1] < 1.05 * errors[0]


def test_exact_codes_leave_everything_else_exact() -> None:
    model = separable()
    for value in list(model.graph.initializers.values()):
        array = constant_of(value)
        if array is not None and array.ndim == 4 and array.shape[1] > 1:
            value.const_value = ir.tensor(np.sign(array).astype(np.float32), name=value.name)
    feeds = {"x": np.random.default_rng(5).normal(size=(8, 32, 6, 6)).astype(np.float32)}
    (expected,) = run_model(model, feeds).values()
    report = share(model, ShareOptions(assign=Assign.NEAREST))
    assert report.figures["codebooks"] == 2
    assert not in_half(report)
    (found,) = run_model(model, feeds).values()
    np.testing.assert_array_equal(found, expected)


def test_constants_that_cost_too_much_stay() -> None:
    """An offset that cancels out: what rounding it loses is large beside what is left."""
    b = ModelBuilder("cancelled")
    x = b.op("MatMul", b.input("x", ["N", 64]), b.weight(64, 256, fan_in=64))
    offset = b.constant(np.linspace(1500, 1501, 256).astype(np.float32), "large")
    x = b.op("Sub", b.op("Add", x, offset), b.constant(np.full(256, 1500, np.float32), "same"))
    b.output(b.op("MatMul", x, b.weight(256, 64, fan_in=256)))
    model = b.build()
    model_io.normalize(model)
    data = np.random.default_rng(4).normal(size=(64, 64)).astype(np.float32)
    report = share(model, ShareOptions(bits=8), open_dataset({"x": data}, input_specs(model)))
    assert "large" not in in_half(report)


def test_names_decide_and_so_does_the_range() -> None:
    model = separable(large=1e6)
    names = {one.value.name for one in rest_of(model, ShareOptions(), ())}
    assert "offset" not in names  # out of the range of half precision
    assert len(names) >= 3
    left = sorted(n for n in names if n)[0]
    kept = {one.value.name for one in rest_of(model, ShareOptions(exclude=(left,)), ())}
    assert kept == names - {left}
    only = {one.value.name for one in rest_of(model, ShareOptions(include=(left,)), ())}
    assert only == {left}


# --- filters of depthwise convolutions -----------------------------------------------------------


def depthwise_of(model: ir.Model) -> str:
    name = next(n for n in model.graph if n.attributes.get_int("group", 1) > 1).inputs[1]
    assert name is not None
    return name.name or ""


@pytest.mark.parametrize("packing", list(Packing))
@pytest.mark.parametrize("mixed", [False, True])
def test_filters_get_codes_where_data_tell_how(packing: Packing, mixed: bool) -> None:
    model = separable(256)
    name = depthwise_of(model)
    how = ShareOptions(bits=4, packing=packing, mixed=mixed, min_elements=128)
    changes = {c.node: c.what for c in share(model, how, samples(model)).changes}
    assert "codes of" in changes[name]
    assert mixed or "8 bits for 256 values" in changes[name]


def test_eight_bits_of_few_weights_need_no_table() -> None:
    model = separable(256)
    name = depthwise_of(model)
    before = constant_of(model.graph.initializers[name])
    feeds = {"x": np.random.default_rng(5).normal(size=(8, 32, 6, 6)).astype(np.float32)}
    (expected,) = run_model(model, feeds).values()
    how = ShareOptions(bits=8, mixed=False, min_elements=128, halves=False)
    share(model, how, samples(model))
    assert before is not None
    codes = model.graph.initializers[f"{name}/share_codes"].const_value
    assert codes is not None
    assert codes.dtype == ir.DataType.INT8
    assert f"{name}/share_levels" not in model.graph.initializers
    (found,) = run_model(model, feeds).values()
    noise = float(np.sum((found.astype(float) - expected) ** 2))
    assert 0 < noise < 1e-3 * float(np.sum(expected.astype(float) ** 2))
    assert "Cast" not in {n.op_type for n in optimized_graph(model, SETTINGS, HERE).graph}
