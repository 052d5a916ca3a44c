"""The HardSigmoid that exporters spell out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxcompress import model_io
from onnxcompress.passes._hard_sigmoid import write_hard_sigmoids
from onnxcompress.passes.simplify import SimplifyOptions, SimplifyPass
from tests.builder import Array, ModelBuilder
from tests.running import context, largest_error, run_model

SHAPE = (2, 8, 5, 5)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph.all_nodes()]


def number(b: ModelBuilder, value: float, *shape: int) -> str:
    return b.constant(np.full(shape, value, np.float32))


def clipped(b: ModelBuilder, x: str, *, offset: float = 3, top: float = 6) -> str:
    return b.op("Clip", b.op("Add", x, number(b, offset)), number(b, 0), number(b, top))


def built(b: ModelBuilder) -> ir.Model:
    model = b.build()
    model_io.normalize(model)
    return model


def feeds(shape: tuple[int, ...] = SHAPE) -> dict[str, Array]:
    return {"x": np.random.default_rng(1).normal(0, 4, shape).astype(np.float32)}


def simplified(model: ir.Model, folder: Path) -> list[str]:
    """Operators after the pass, with the outputs as before."""
    expected = run_model(model, feeds())
    SimplifyPass(SimplifyOptions(onnxsim=False)).run(model, context(folder))
    assert largest_error(run_model(model, feeds()), expected) < 1e-6
    return ops(model)


def _divided(b: ModelBuilder, x: str) -> str:
    return b.op("Mul", x, b.op("Div", clipped(b, x), number(b, 6)))


def _multiplied(b: ModelBuilder, x: str) -> str:
    return b.op("Mul", b.op("Mul", number(b, 1 / 6), clipped(b, x)), x)


def _divided_behind(b: ModelBuilder, x: str) -> str:
    return b.op("Div", b.op("Mul", x, clipped(b, x)), number(b, 6, 1))


def _multiplied_behind(b: ModelBuilder, x: str) -> str:
    return b.op("Mul", b.op("Mul", clipped(b, x), x), number(b, 1 / 6, 1, 1, 1, 1))


@pytest.mark.parametrize("write", [_divided, _multiplied, _divided_behind, _multiplied_behind])
def test_hard_swish_takes_two_operators(write: object, tmp_path: Path) -> None:
    assert callable(write)
    b = ModelBuilder("swish")
    b.output(write(b, b.conv(b.input("x", SHAPE), 8, 8)))
    assert simplified(built(b), tmp_path) == ["Conv", "HardSigmoid", "Mul"]


def test_the_gate_of_a_squeeze_excite_block_takes_one(tmp_path: Path) -> None:
    b = ModelBuilder("gate")
    x = b.input("x", SHAPE)
    gate = b.conv(b.op("GlobalAveragePool", x), 8, 8, kernel=1)
    b.output(b.op("Mul", x, b.op("Div", clipped(b, gate), number(b, 6))))
    assert simplified(built(b), tmp_path) == ["GlobalAveragePool", "Conv", "HardSigmoid", "Mul"]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    offset=st.floats(-5, 5, width=32),
    top=st.floats(0.125, 20, width=32),
    behind=st.booleans(),
    divides=st.booleans(),
)
def test_any_offset_and_bound_give_the_same(
    offset: float, top: float, behind: bool, divides: bool
) -> None:
    b = ModelBuilder("any")
    x = b.input("x", ["n", 8])
    value = clipped(b, x, offset=offset, top=top)
    value = b.op("Mul", value, b.op("Neg", x)) if behind else value
    last = ("Div", top) if divides else ("Mul", 1 / top)
    b.output(b.op(last[0], value, number(b, last[1])))
    model = built(b)
    expected = run_model(model, feeds((3, 8)))
    assert write_hard_sigmoids(model) == 1
    model_io.check(model)
    found = run_model(model, feeds((3, 8)))
    # An offset far above the bound may cancel to the last bit of either.
    for name, array in expected.items():
        error = np.abs(found[name].astype(np.float64) - array.astype(np.float64))
        assert (error <= 1e-5 * (1 + abs(offset) / top + np.abs(array.astype(np.float64)))).all()


@pytest.mark.parametrize("wrong", ["bound", "factor", "read", "output", "double", "vector", "axis"])
def test_what_is_no_hard_sigmoid_stays(wrong: str) -> None:
    b = ModelBuilder("stays", dtype=np.float64 if wrong == "double" else np.float32)
    x = b.input("x", ["n", 8] if wrong != "axis" else [8])
    kind = b.dtype.type
    offset = np.arange(8) if wrong == "vector" else np.full((1, 1) if wrong == "axis" else (), 3)
    low = -1 if wrong == "bound" else 0
    added = b.op("Add", x, b.constant(offset.astype(kind)))
    value = b.op("Clip", added, b.constant(kind(low)), b.constant(kind(6)))
    if wrong == "read":
        b.output(b.op("Neg", value))
    if wrong == "output":
        b.output(value)
    b.output(b.op("Div", value, b.constant(kind(5 if wrong == "factor" else 6))))
    assert write_hard_sigmoids(built(b)) == 0


def test_bounds_of_old_models_are_attributes() -> None:
    b = ModelBuilder("old", opset=10)
    x = b.input("x", ["n", 8])
    value = b.op("Clip", b.op("Add", x, number(b, 3)), min=0.0, max=6.0)
    b.output(b.op("Div", value, number(b, 6)))
    model = b.build()
    model_io.infer_shapes(model)
    assert write_hard_sigmoids(model) == 1
    (found,) = run_model(model, feeds((3, 8))).values()
    expected = np.clip(feeds((3, 8))["x"].astype(np.float64) / 6 + 0.5, 0, 1)
    assert np.abs(found.astype(np.float64) - expected).max() < 1e-6
