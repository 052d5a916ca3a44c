"""Binary and ternary weights, from rounding to the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxcompress import model_io
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.errors import UsageError
from onnxcompress.graph.constants import constant_of
from onnxcompress.interface import input_specs
from onnxcompress.numerics import signs
from onnxcompress.passes._packing import digits_per_byte, packed_digits
from onnxcompress.passes.weight_only import Rounding, WeightOnlyOptions, WeightOnlyPass
from onnxcompress.runtime import optimized_graph
from tests.builder import ModelBuilder
from tests.fixtures import fixture
from tests.running import SETTINGS, context, interface, run_model

HERE = Path()  # the pass writes no files


@pytest.mark.parametrize(("base", "count"), [(2, 8), (3, 5), (4, 4), (16, 2)])
def test_digits_come_back(base: int, count: int) -> None:
    assert digits_per_byte(base) == count
    codes = np.random.default_rng(base).integers(0, base, 33).astype(np.uint8)
    packed = packed_digits(codes, base)
    assert packed.shape == (1, -(-33 // count))
    back = packed.astype(np.int64) // base ** np.arange(count)[:, None] % base
    np.testing.assert_array_equal(back.ravel()[:33], codes)


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("block", [0, 12])
@pytest.mark.parametrize(
    "name", ["conv_1d_3d", "grouped_shuffle", "mini_transformer", "lstm", "if_model", "opset7"]
)
def test_onnxruntime_computes_the_weights_meant(name: str, bits: int, block: int) -> None:
    model = fixture(name).build()
    model_io.normalize(model)
    before = interface(model)
    options = WeightOnlyOptions(bits=bits, block_size=block, min_elements=1)
    report = WeightOnlyPass(options).run(model, context(HERE))
    assert report.changes
    assert any("not trained for" in note for note in report.notes)
    model_io.check(model)
    assert interface(model) == before
    folded = optimized_graph(model, SETTINGS)
    assert not any(node.op_type == "Mod" for node in folded.graph)
    assert run_model(model, fixture(name).feeds(model))


@pytest.mark.parametrize(("bits", "levels"), [(1, 2), (2, 3)])
@pytest.mark.parametrize("block", [0, 7])
def test_a_product_with_them_is_that_of_the_dequantized_matrix(
    bits: int, levels: int, block: int
) -> None:
    b = ModelBuilder("product")
    b.output(b.op("MatMul", b.input("x", [3, 40]), b.weight(40, 24, name="w")))
    model = b.build()
    model_io.normalize(model)
    weight = constant_of(model.graph.initializers["w"])
    assert weight is not None
    matrix = np.ascontiguousarray(weight.T, dtype=np.float32)
    exact = signs.fitted(matrix, levels=levels, block=block or 40).dequantized()
    options = WeightOnlyOptions(bits=bits, block_size=block, min_elements=1)
    WeightOnlyPass(options).run(model, context(HERE))
    x = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
    (found,) = run_model(model, {"x": x}).values()
    np.testing.assert_allclose(found.astype(np.float64), x @ exact.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bits", "times"), [(1, 27), (2, 18)])
def test_files_are_as_small_as_promised(bits: int, times: int, tmp_path: Path) -> None:
    b = ModelBuilder("large")
    b.output(b.op("MatMul", b.input("x", [3, 512]), b.weight(512, 512)))
    model = b.build()
    model_io.save(model, tmp_path / "float.onnx")
    report = WeightOnlyPass(WeightOnlyOptions(bits=bits)).run(model, context(HERE))
    model_io.save(model, tmp_path / "small.onnx")
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("float", "small")]
    assert sizes[0] > times * sizes[1]
    stored = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    assert 0 <= stored - int(report.figures["weight_bytes_after"]) < 256


def test_feedback_brings_the_outputs_nearer() -> None:
    model = fixture("conv_chain").build()
    model_io.normalize(model)
    many = fixture("conv_chain").feeds(model, batch=64, seed=1)
    job = context(HERE, open_dataset(many, input_specs(model)))
    feeds = fixture("conv_chain").feeds(model, batch=32, seed=2)
    expected = run_model(model, feeds)
    errors = {}
    for rounding in Rounding:
        quantized = model.clone()
        options = WeightOnlyOptions(bits=2, rounding=rounding, min_elements=1)
        WeightOnlyPass(options).run(quantized, job)
        found = run_model(quantized, feeds)
        errors[rounding] = sum(
            float(np.square(found[n].astype(np.float64) - a.astype(np.float64)).sum())
            for n, a in expected.items()
        )
    assert errors[Rounding.GPTQ] < 0.9 * errors[Rounding.NEAREST]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": "3"}, "must be 8, 4, 2 or 1"),
        ({"bits": "1", "format": "matmul_nbits"}, "does not go with"),
        ({"bits": "2", "symmetric": "false"}, "has no zero point"),
    ],
)
def test_options_that_contradict(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        WeightOnlyOptions.parse(values, owner="weights")
