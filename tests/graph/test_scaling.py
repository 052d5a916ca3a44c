"""Regions of scaled tensors: found where they exist, refused where not, and the function stays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxcompress import model_io
from onnxcompress.calibration.synthetic import synthetic_dataset
from onnxcompress.graph.naming import Namer
from onnxcompress.graph.scaling import Region, apply_factors, find_region
from tests.builder import Array, ModelBuilder
from tests.fixtures import RUNNABLE, Fixture
from tests.running import largest_error, run_model


def _values(model: ir.Model) -> dict[str, ir.Value]:
    return {v.name or "": v for node in model.graph for v in node.outputs}


def _scale(model: ir.Model, name: str, axis: int, seed: int = 0) -> Region | str:
    """Scale one tensor by random factors; returns the region or the refusal."""
    region = find_region(_values(model)[name], axis)
    if isinstance(region, Region):
        factors = np.exp(np.random.default_rng(seed).normal(0, 1, region.units))
        apply_factors(model, region, factors, Namer(model), "test")
        model_io.check(model)
    return region


def _normalized(builder: ModelBuilder) -> ir.Model:
    model = builder.build()
    model_io.normalize(model)
    return model


def _feeds(model: ir.Model, seed: int = 1) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        shape = [d if isinstance(d, int) else 2 for d in value.shape]
        feeds[value.name or ""] = rng.normal(0, 1, shape).astype(np.float32)
    return feeds


def test_residual_stream_is_one_region() -> None:
    b = ModelBuilder("residual")
    x = b.op("Relu", b.conv(b.input("x", ["n", 3, 8, 8]), 3, 6))
    hidden = b.op("Relu", b.conv(x, 6, 5))
    y = b.op("Add", b.conv(hidden, 5, 6), x)
    b.output(b.conv(b.op("GlobalAveragePool", b.op("Relu", y)), 6, 4, 1))
    model = _normalized(b)
    reference = model_io.clone(model)
    region = _scale(model, x, 1)
    assert isinstance(region, Region)
    assert region.units == 6
    # The first convolution and the one before the Add make it; two others read it.
    assert sum(a.contracts for a in region.sources) == 2
    assert sum(a.contracts for a in region.sinks) == 2
    feeds = _feeds(model)
    assert largest_error(run_model(model, feeds), run_model(reference, feeds)) < 1e-4
    inner = _scale(model, hidden, 1)
    assert isinstance(inner, Region)
    assert inner.units == 5


def test_values_of_attention_take_factors_through_heads() -> None:
    b = ModelBuilder("attention")
    x = b.input("x", ["n", 7, 12])
    q, k, v = (b.linear(x, 12, 12) for _ in range(3))

    def heads(y: str, perm: list[int]) -> str:
        return b.op("Transpose", b.op("Reshape", y, b.constant([0, 0, 3, 4])), perm=perm)

    scores = b.op("MatMul", heads(q, [0, 2, 1, 3]), heads(k, [0, 2, 3, 1]))
    context = b.op("MatMul", b.op("Softmax", scores, axis=-1), heads(v, [0, 2, 1, 3]))
    joined = b.op("Reshape", b.op("Transpose", context, perm=[0, 2, 1, 3]), b.constant([0, 0, 12]))
    b.output(b.linear(joined, 12, 5))
    model = _normalized(b)
    reference = model_io.clone(model)
    region = _scale(model, joined, -1)
    assert isinstance(region, Region)
    assert region.units == 12
    feeds = _feeds(model)
    assert largest_error(run_model(model, feeds), run_model(reference, feeds)) < 1e-4
    # Queries meet keys in a product of computed tensors.
    refused = find_region(_values(model)[q], -1)
    assert isinstance(refused, str)
    assert "MatMul" in refused


def test_gated_product_takes_factors_on_the_linear_side() -> None:
    b = ModelBuilder("gated")
    x = b.input("x", ["n", 8])
    gate = b.op("Sigmoid", b.linear(x, 8, 6))
    y = b.op("Mul", gate, b.linear(x, 8, 6))
    b.output(b.linear(y, 6, 3))
    model = _normalized(b)
    reference = model_io.clone(model)
    assert isinstance(_scale(model, y, -1), Region)
    feeds = _feeds(model)
    assert largest_error(run_model(model, feeds), run_model(reference, feeds)) < 1e-4


def test_square_of_a_tensor_is_refused() -> None:
    b = ModelBuilder("square")
    y = b.linear(b.input("x", ["n", 8]), 8, 6)
    left, right = b.op("Relu", y), b.op("Identity", y)
    b.output(b.linear(b.op("Mul", left, right), 6, 3))
    model = _normalized(b)
    refused = find_region(_values(model)[y], -1)
    assert isinstance(refused, str)
    assert "both its operands" in refused


@pytest.mark.parametrize(
    ("op_type", "extra", "word"),
    [
        ("Sigmoid", (), "commute"),
        ("Clip", (0.0, 6.0), "bound 6"),
        ("Softmax", (), "commute"),
        ("LayerNormalization", (1,), "normalizes over"),
    ],
)
def test_what_cannot_hand_factors_on_says_why(
    op_type: str, extra: tuple[float, ...], word: str
) -> None:
    b = ModelBuilder(f"refused_{op_type}")
    y = b.linear(b.input("x", ["n", 8]), 8, 6)
    if op_type == "Clip":
        z = b.op("Clip", y, *(b.constant(np.array(e, np.float32)) for e in extra))
    elif op_type == "LayerNormalization":
        z = b.op("LayerNormalization", y, b.weight(6, low=0.5), axis=-1)
    else:
        z = b.op(op_type, y)
    b.output(b.linear(z, 6, 3))
    refused = find_region(_values(_normalized(b))[y], -1)
    assert isinstance(refused, str)
    assert word in refused


def _behind_relu(build: Callable[[ModelBuilder, str], tuple[str, int]]) -> tuple[ir.Model, str]:
    """A convolution with Relu, what ``build`` makes of its 6 channels, and a layer behind."""
    b = ModelBuilder("between")
    x = b.op("Relu", b.conv(b.input("x", ["n", 3, 8, 8]), 3, 6))
    y, channels = build(b, x)
    b.output(b.conv(y, channels, 4, 1))
    return _normalized(b), x


@pytest.mark.parametrize(
    ("build", "units"),
    [
        (lambda b, x: (b.op("Concat", x, b.op("Relu", b.conv(x, 6, 5)), axis=1), 11), 11),
        (lambda b, x: (b.op("Pad", x, b.constant([0, 2, 1, 1, 0, 1, 1, 1])), 9), 9),
        (lambda b, x: (b.op("Slice", x, *map(b.constant, ([0], [8], [2], [2]))), 6), 6),
    ],
    ids=["Concat", "Pad", "Slice"],
)
def test_channels_beside_have_factors_of_their_own(
    build: Callable[[ModelBuilder, str], tuple[str, int]], units: int
) -> None:
    model, name = _behind_relu(build)
    reference = model_io.clone(model)
    region = _scale(model, name, 1)
    assert isinstance(region, Region)
    assert region.units == units
    feeds = _feeds(model)
    assert largest_error(run_model(model, feeds), run_model(reference, feeds)) < 1e-4


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda b, x: (b.op("Slice", x, *map(b.constant, ([0], [3], [1]))), 3), "part of"),
        (
            lambda b, x: (
                b.op("Slice", x, *map(b.constant, ([5], [-9], [1], [-1]))),
                6,
            ),
            "turn the channels",
        ),
        (
            lambda b, x: (b.op("Pad", x, b.constant([0, 1, 0, 0, 0, 0, 0, 0]), mode="edge"), 7),
            "repeats or drops",
        ),
    ],
    ids=["part", "reversed", "repeated"],
)
def test_channels_that_change_places_are_refused(
    build: Callable[[ModelBuilder, str], tuple[str, int]], word: str
) -> None:
    model, name = _behind_relu(build)
    refused = find_region(_values(model)[name], 1)
    assert isinstance(refused, str)
    assert word in refused


@pytest.mark.parametrize("case", RUNNABLE, ids=str)
def test_every_region_of_every_fixture_keeps_the_function(case: Fixture) -> None:
    model = case.build()
    model_io.normalize(model)
    reference = model_io.clone(model)
    feeds = synthetic_dataset(reference, samples=2, seed=0).first()
    names = [
        (v.name or "", axis)
        for node in model.graph
        for v in node.outputs[:1]
        if v.shape is not None and v.dtype == ir.DataType.FLOAT
        for axis in {min(1, len(v.shape) - 1), len(v.shape) - 1}
        if axis >= 0
    ]
    for seed, (name, axis) in enumerate(names):
        region = find_region(_values(model)[name], axis)
        if isinstance(region, Region):
            factors = np.random.default_rng(seed).uniform(0.8, 1.25, region.units)
            apply_factors(model, region, factors, Namer(model), "test")
    assert largest_error(run_model(model, feeds), run_model(reference, feeds)) < 1e-4


@st.composite
def _networks(draw: st.DrawFn) -> tuple[ModelBuilder, list[str]]:
    """A random convolutional network with residual, parallel and depthwise parts."""
    b = ModelBuilder(f"random{draw(st.integers(0, 999))}")
    width = draw(st.sampled_from([4, 6]))
    x = b.op("Relu", b.conv(b.input("x", ["n", 3, 6, 6]), 3, width))
    made = [x]
    for _ in range(draw(st.integers(1, 5))):
        match draw(st.integers(0, 8)):
            case 0:
                x = b.conv(x, width, width)
            case 1:
                x = b.conv(x, width, width, groups=width)
            case 2:
                x = b.op("Relu", x)
            case 3:
                x = b.op("Add", x, made[draw(st.integers(0, len(made) - 1))])
            case 4:
                x = b.op("PRelu", x, b.weight(width, 1, 1, low=0.1))
            case 5:
                x = b.op("Mul", x, b.op("Sigmoid", b.conv(x, width, width, 1)))
            case 6:
                y = b.op("Concat", x, made[draw(st.integers(0, len(made) - 1))], axis=1)
                x = b.conv(y, 2 * width, width, 1)
            case 7:
                y = b.op("Pad", x, b.constant([0, 1, 0, 0, 0, 2, 0, 0]))
                x = b.conv(y, width + 3, width, 1)
            case _:
                x = b.batch_norm(b.conv(x, width, width, 1, groups=2), width)
        made.append(x)
    b.output(b.gemm(b.op("Flatten", b.op("GlobalAveragePool", x), axis=1), width, 3))
    return b, made


@given(_networks(), st.integers(0, 1000))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_networks_keep_their_function(
    network: tuple[ModelBuilder, list[str]], seed: int
) -> None:
    builder, names = network
    model = _normalized(builder)
    reference = model_io.clone(model)
    for name in names:
        if name in _values(model):
            _scale(model, name, 1, seed)
    feeds = _feeds(model)
    assert largest_error(run_model(model, feeds), run_model(reference, feeds)) < 1e-3
