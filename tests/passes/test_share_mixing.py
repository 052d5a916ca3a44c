from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress import model_io
from onnxcompress.calibration.sources import Dataset, open_dataset
from onnxcompress.graph.constants import constant_of
from onnxcompress.interface import input_specs
from onnxcompress.passes.prune.samples import judging_note, judging_samples
from onnxcompress.passes.quant.samples import macs_of
from onnxcompress.passes.share import Assign, Codebook, Packing, ShareOptions, SharePass
from onnxcompress.passes.share.emit import code_bytes
from onnxcompress.passes.share.mixing import chosen_bits, mixes
from onnxcompress.passes.share.select import Weight, select
from tests.builder import ModelBuilder
from tests.running import context, run_model


def product_chain(*widths: int) -> ir.Model:
    """Products one behind the other."""
    b = ModelBuilder("product_chain")
    value = b.input("x", [None, widths[0]])
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        weight = b.weight(inputs, outputs, fan_in=inputs, name=f"w{number}")
        value = b.op("Tanh", b.op("MatMul", value, weight))
    b.output(value)
    return normalized(b)


def unequal_branches() -> ir.Model:
    """A small product that makes most of the output, beside large ones that make little of it."""
    b = ModelBuilder("unequal_branches")
    x = b.input("x", [None, 96])
    hidden = b.op("Tanh", b.op("MatMul", x, b.weight(96, 256, fan_in=96)))
    large = b.op("MatMul", hidden, b.weight(256, 16, fan_in=256))
    small = b.op("MatMul", x, b.weight(96, 16, fan_in=4))
    b.output(b.op("Add", large, small))
    return normalized(b)


def normalized(b: ModelBuilder) -> ir.Model:
    model = b.build()
    model_io.normalize(model)
    return model


def samples(model: ir.Model, count: int = 64) -> Dataset:
    width = ir.to_proto(model).graph.input[0].type.tensor_type.shape.dim[1].dim_value
    data = np.random.default_rng(5).normal(size=(count, width)).astype(np.float32)
    return open_dataset({"x": data}, input_specs(model))


def weights_of(model: ir.Model) -> tuple[Weight, ...]:
    return select(model, ShareOptions()).weights


MODEL = product_chain(48, 64, 96, 64, 32)
WEIGHTS = weights_of(MODEL)


@settings(deadline=None)
@given(
    errors=st.lists(st.floats(1e-9, 1.0), min_size=4, max_size=4),
    bits=st.integers(2, 8),
    margin=st.floats(0.0, 0.5),
)
def test_bits_stay_within_the_bytes(errors: list[float], bits: int, margin: float) -> None:
    options = ShareOptions(bits=bits, margin=margin)
    by_name = {w.name: e for w, e in zip(WEIGHTS, errors, strict=True)}
    found = chosen_bits(WEIGHTS, by_name, options)
    assert all(max(bits - 1, 2) <= b <= 8 for b in found.values())
    asked = sum(code_bytes(w, options, bits) for w in WEIGHTS)
    spent = sum(code_bytes(w, options, found[w.name]) for w in WEIGHTS)
    assert spent <= (1 + margin) * asked + 1
    uniform = sum(errors)
    assert sum(by_name[n] * 4.0 ** (bits - b) for n, b in found.items()) <= uniform * (1 + 1e-9)


def test_the_weight_that_hurts_most_gets_most_bits() -> None:
    errors = {w.name: 1e-3 for w in WEIGHTS}
    errors["w0"] = 0.5
    found = chosen_bits(WEIGHTS, errors, ShareOptions(bits=4))
    assert found["w0"] > max(b for n, b in found.items() if n != "w0")


def test_nothing_is_spent_where_errors_are_small() -> None:
    errors = {w.name: 1e-7 for w in WEIGHTS}
    options = ShareOptions(bits=5, margin=0.5)
    found = chosen_bits(WEIGHTS, errors, options)
    asked = sum(code_bytes(w, options, 5) for w in WEIGHTS)
    assert sum(code_bytes(w, options, found[w.name]) for w in WEIGHTS) <= asked


def test_whole_bytes_are_mixed_without_a_margin() -> None:
    errors = {w.name: 1e-2 * 4.0**number for number, w in enumerate(WEIGHTS)}
    options = ShareOptions(bits=5, margin=0.5, packing=Packing.BYTES)
    found = chosen_bits(WEIGHTS, errors, options)
    assert len(set(found.values())) > 1
    asked = sum(code_bytes(w, options, 5) for w in WEIGHTS)
    assert sum(code_bytes(w, options, found[w.name]) for w in WEIGHTS) <= asked


def test_less_is_spent_the_more_is_lost_already() -> None:
    errors = {w.name: 1e-2 for w in WEIGHTS}
    options = ShareOptions(bits=4, margin=0.5)
    spent = []
    for enough in (1e-5, 2e-2, 1e-1):
        found = chosen_bits(WEIGHTS, errors, options, enough)
        spent.append(sum(code_bytes(w, options, found[w.name]) for w in WEIGHTS))
    asked = sum(code_bytes(w, options, 4) for w in WEIGHTS)
    assert spent[0] > spent[1] > spent[2]
    assert spent[2] <= asked


def test_weights_whose_errors_are_not_seen_keep_the_bits_asked_for() -> None:
    errors = {w.name: 0.0 for w in WEIGHTS}
    assert set(chosen_bits(WEIGHTS, errors, ShareOptions(bits=4, margin=0.5)).values()) == {4}


def test_mixed_bits_bring_outputs_nearer_in_as_many_bytes(tmp_path: Path) -> None:
    model = unequal_branches()
    data = samples(model, 256)
    feeds = {"x": np.random.default_rng(6).normal(size=(64, 96)).astype(np.float32)}
    (expected,) = run_model(model, feeds).values()
    errors, sizes = [], []
    for mixed in (False, True):
        copy = model.clone()
        options = ShareOptions(bits=3, mixed=mixed, margin=0.0)
        report = SharePass(options).run(copy, context(tmp_path, data))
        (found,) = run_model(copy, feeds).values()
        errors.append(float(np.sum((found.astype(float) - expected.astype(float)) ** 2)))
        sizes.append(report.figures["weight_bytes_after"])
    assert errors[1] < 0.8 * errors[0]
    assert float(sizes[1]) <= float(sizes[0])


def test_integers_that_hurt_most_keep_their_bits(tmp_path: Path) -> None:
    b = ModelBuilder("two_quantized_products")
    value = b.input("x", [None, 32])
    for number, (rows, columns) in enumerate([(32, 32), (32, 512)]):
        integers = b.rng.integers(-127, 128, (rows, columns)).astype(np.int8)
        scale = np.full(columns, 0.003, np.float32)
        parts = (
            b.constant(integers, f"w{number}"),
            b.constant(scale),
            b.constant(np.zeros(columns, np.int8)),
        )
        value = b.op("MatMul", value, b.op("DequantizeLinear", *parts, axis=1))
    b.output(value)
    model = normalized(b)
    before = constant_of(model.graph.initializers["w0"])
    report = SharePass(ShareOptions(bits=4, margin=0.5)).run(
        model, context(tmp_path, samples(model))
    )
    reasons = {skip.node: skip.reason for skip in report.skips}
    assert "keeps its 8 bits" in reasons["w0"]
    np.testing.assert_array_equal(constant_of(model.graph.initializers["w0"]), before)


@pytest.mark.parametrize(
    "options",
    [
        ShareOptions(mixed=False),
        ShareOptions(assign=Assign.NEAREST),
        ShareOptions(codebook=Codebook.VECTOR),
    ],
)
def test_when_all_weights_have_the_same_bits(options: ShareOptions, tmp_path: Path) -> None:
    assert mixes(ShareOptions(), context(tmp_path, samples(MODEL)))
    assert not mixes(options, context(tmp_path, samples(MODEL)))
    assert not mixes(ShareOptions(), context(tmp_path))


def test_large_models_are_judged_on_fewer_samples() -> None:
    model = unequal_branches()
    data = samples(model, 64)
    assert judging_samples(model, data, 32, 10) == 32
    small = macs_of(model, data)
    assert judging_samples(model, data, 32, int(1e12 // (10 * (small // 2)))) == 10
    assert judging_samples(model, data, 32, 10**12) == 4
    assert judging_note("Errors", 32, 32) == ()
    assert "on 10 samples instead of 32" in judging_note("Errors", 10, 32)[0]
