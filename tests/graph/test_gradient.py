"""Gradients against differences of the loss along random directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.errors import ModelError
from onnxcompress.graph.constants import constant_of
from onnxcompress.graph.gradient import OPSET, RULES, Gradients, differentiate
from onnxcompress.graph.probe import probe
from onnxcompress.opset import upgrade
from tests.builder import ModelBuilder
from tests.fixtures import RUNNABLE, Fixture
from tests.running import run_model

Array = npt.NDArray[np.generic]
Feeds = dict[str, Array]


def _prepared(model: ir.Model, feeds: Feeds) -> ir.Model:
    """A copy of operator set 18 whose inputs have the shapes of ``feeds``."""
    found = model_io.clone(model)
    if found.opset_imports[""] < OPSET:
        upgrade(found, OPSET)
    found.ir_version = max(found.ir_version, 8)
    for value in found.graph.inputs:
        if value.name in feeds:
            value.shape = ir.Shape(feeds[value.name].shape)
    return found


def _weights(model: ir.Model) -> list[ir.Value]:
    """All that may move: a single number may be an epsilon or a bound."""
    return [
        v
        for v in model.graph.initializers.values()
        if v.dtype == ir.DataType.FLOAT and v.const_value is not None and v.const_value.size > 1
    ]


def _seeded(model: ir.Model, feeds: Feeds) -> tuple[dict[ir.Value, ir.Value], dict[str, Array]]:
    """Seeds for ``Σ c y`` with random ``c`` for every output in float, and ``c`` by name."""
    rng = np.random.default_rng(1)
    made = run_model(model, feeds)
    seeds: dict[ir.Value, ir.Value] = {}
    factors: dict[str, Array] = {}
    for output in model.graph.outputs:
        y = made[output.name or ""]
        if y.dtype != np.float32:
            continue
        c = rng.standard_normal(y.shape).astype(np.float32)
        name = f"seed/{output.name}"
        value = ir.Value(name=name, const_value=ir.Tensor(c, name=name))
        model.graph.register_initializer(value)
        seeds[output], factors[output.name or ""] = value, c
    return seeds, factors


def _loss(model: ir.Model, feeds: Feeds, factors: dict[str, Array]) -> float:
    made = run_model(model, feeds)
    return float(sum(np.vdot(np.float64(made[n]), np.float64(c)) for n, c in factors.items()))


def _check(
    model: ir.Model,
    feeds: Feeds,
    *,
    step: float = 1e-2,
    tolerance: float = 1e-2,
) -> Gradients:
    """Compare the gradient of every weight with what a small step along it does to the loss."""
    plain = _prepared(model, feeds)
    whole = model_io.clone(plain)
    seeds, factors = _seeded(whole, feeds)
    own = [w for w in _weights(whole) if not (w.name or "").startswith("seed/")]
    gradients = differentiate(whole, seeds, own, probe(whole).static)
    outputs = list(whole.graph.outputs)
    named = {}
    for weight, gradient in gradients.of.items():
        named[weight.name or ""] = gradient.name or ""
        gradient.dtype = ir.DataType.FLOAT
        outputs.append(gradient)
    whole.graph.outputs[:] = outputs
    found = run_model(whole, feeds)
    for name, gradient_name in named.items():
        value = plain.graph.initializers[name]
        array = constant_of(value)
        assert array is not None
        slope = found[gradient_name].astype(np.float64)
        assert slope.shape == array.shape
        norm = float(np.linalg.norm(slope))
        if norm < 1e-6:
            continue
        losses = []
        for sign in (1, -1):
            moved = array.astype(np.float64) + sign * step * slope / norm
            value.const_value = ir.Tensor(moved.astype(np.float32), name=name)
            losses.append(_loss(plain, feeds, factors))
        value.const_value = ir.Tensor(array, name=name)
        risen = (losses[0] - losses[1]) / (2 * step)
        assert risen == pytest.approx(norm, rel=tolerance, abs=1e-3), name
    return gradients


Build = Callable[[ModelBuilder, str], str]


def _op(op_type: str, *, opset: int = 18, **attributes: Any) -> tuple[int, Build]:
    return opset, lambda b, x: b.op(op_type, x, **attributes)


def _ints(op_type: str, *values: object, **attributes: Any) -> tuple[int, Build]:
    """An operator with vectors of integers behind its data."""
    return 18, lambda b, x: b.op(
        op_type, x, *(b.constant(np.array(v)) for v in values), **attributes
    )


def _positive(op_type: str) -> tuple[int, Build]:
    return 18, lambda b, x: b.op(op_type, b.op("Exp", x))


def _with(op_type: str, *shape: int, first: bool = False, **attributes: Any) -> tuple[int, Build]:
    """An operator with a weight as its second input, or its first."""

    def build(b: ModelBuilder, x: str) -> str:
        weight = b.weight(*shape, low=0.5)
        return b.op(op_type, *((weight, x) if first else (x, weight)), **attributes)

    return 18, build


def _conv(*shape: int, bias: bool = True, **attributes: Any) -> tuple[int, Build]:
    def build(b: ModelBuilder, x: str) -> str:
        inputs = [x, b.weight(*shape)] + ([b.weight(shape[0])] if bias else [])
        return b.op("Conv", *inputs, **attributes)

    return 18, build


def _split(b: ModelBuilder, x: str) -> str:
    parts = b.ops("Split", x, b.constant([1, 2, 1]), outputs=3, axis=1)
    return b.op("Mul", parts[0], parts[2])


def _concat(b: ModelBuilder, x: str) -> str:
    return b.op("Concat", x, b.op("Relu", x), axis=-1)


def _two(op_type: str, **attributes: Any) -> tuple[int, Build]:
    """An operator of two computed inputs."""
    return 18, lambda b, x: b.op(op_type, x, b.op("Tanh", x), **attributes)


def _where(b: ModelBuilder, x: str) -> str:
    condition = b.constant(np.arange(6) % 2 == 0)
    return b.op("Where", condition, x, b.op("Tanh", x))


def _scaled(b: ModelBuilder, x: str) -> str:
    return b.op("LayerNormalization", x, b.weight(6, low=0.5), b.weight(6), axis=-1, epsilon=1e-3)


def _matmul(b: ModelBuilder, x: str) -> str:
    flat = b.op("Reshape", x, b.constant([2, 4, 30]))
    return b.op("MatMul", flat, b.weight(30, 7))


def _attention(b: ModelBuilder, x: str) -> str:
    return b.op("MatMul", x, b.op("Transpose", b.op("Tanh", x), perm=[0, 1, 3, 2]))


def _repeated(b: ModelBuilder, x: str) -> str:
    return b.op("MatMul", b.weight(1, 4, 3, 5), x)


def _gemm(**attributes: Any) -> tuple[int, Build]:
    flip_a, flip_b = attributes.get("transA"), attributes.get("transB")

    def build(b: ModelBuilder, x: str) -> str:
        flat = b.op("Reshape", x, b.constant([40, 6] if flip_a else [6, 40]))
        shape = (3, 40) if flip_b else (40, 3)
        return b.op("Gemm", flat, b.weight(*shape), b.weight(3), **attributes)

    return 18, build


def _gathered(b: ModelBuilder, x: str) -> str:
    return b.op("Gather", x, b.constant(np.array(-1)), axis=1)


SHAPE = (2, 4, 5, 6)
_PLAIN = """
Abs Elu Erf Exp Flatten GlobalAveragePool GlobalMaxPool HardSigmoid HardSwish Identity LeakyRelu
LogSoftmax Neg ReduceMax ReduceMean ReduceMin ReduceSum Relu Sigmoid Softmax Softplus Tanh Transpose
"""
CASES: Mapping[str, tuple[int, Build]] = {
    **{name: _op(name) for name in _PLAIN.split()},
    **{f"{name} of two": _two(name) for name in ("Add", "Div", "Max", "Min", "Mul", "Sub", "Sum")},
    **{name: _positive(name) for name in ("Log", "Reciprocal", "Sqrt")},
    "Add repeated": _with("Add", 4, 1, 1),
    "AveragePool": _op("AveragePool", kernel_shape=[2, 3], strides=[2, 1]),
    "AveragePool padded": _op("AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    "AveragePool padding counted": _op(
        "AveragePool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2], count_include_pad=1
    ),
    "BatchNormalization": (18, lambda b, x: b.batch_norm(x, 4)),
    "Cast": _op("Cast", to=1),
    "Clip": (18, lambda b, x: b.op("Clip", x, b.constant(-0.5), b.constant(0.7))),
    "Concat": (18, _concat),
    "Conv": _conv(3, 4, 3, 3, pads=[1, 1, 1, 1]),
    "Conv strided": _conv(3, 4, 3, 2, strides=[2, 3], pads=[1, 0, 0, 1], bias=False),
    "Conv dilated": _conv(3, 4, 2, 2, dilations=[2, 3]),
    "Conv grouped": _conv(6, 2, 3, 3, group=2, pads=[1, 1, 1, 1]),
    "Conv depthwise": _conv(4, 1, 3, 3, group=4, auto_pad="SAME_UPPER", strides=[2, 2]),
    "Conv same lower": _conv(3, 4, 2, 2, auto_pad="SAME_LOWER"),
    "Conv valid": _conv(3, 4, 1, 1, auto_pad="VALID", strides=[2, 2]),
    "DepthToSpace DCR": _op("DepthToSpace", blocksize=2),
    "DepthToSpace CRD": _op("DepthToSpace", blocksize=2, mode="CRD"),
    "Div repeated": _with("Div", 6),
    "Div by it": _with("Div", 1, 5, 1, first=True),
    "Dropout": _op("Dropout"),
    "Expand": _ints("Expand", [3, 1, 1, 1, 1]),
    "Gather": (18, _gathered),
    "Gelu": _op("Gelu", opset=20),
    "Gemm": _gemm(alpha=0.5, beta=2.0),
    "Gemm transposed": _gemm(transB=1),
    "Gemm transposed data": _gemm(transA=1),
    "Gemm transposed both": _gemm(transA=1, transB=1, alpha=3.0),
    "LayerNormalization": (18, _scaled),
    "MatMul": (18, _matmul),
    "MatMul of two": (18, _attention),
    "MatMul repeated": (18, _repeated),
    "MaxPool": _op("MaxPool", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 0]),
    "MaxPool that rounds up": _op("MaxPool", kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1),
    "Mul repeated": _with("Mul", 4, 1, 1),
    "PRelu": _with("PRelu", 4, 1, 1),
    "Pad": _ints("Pad", [0, 0, 1, 2, 0, 0, 0, 3]),
    "Pow": (18, lambda b, x: b.op("Pow", x, b.constant(2.0))),
    "Pow three": (18, lambda b, x: b.op("Pow", x, b.constant(3.0))),
    "ReduceMax of axes": _ints("ReduceMax", [1, -1], keepdims=0),
    "ReduceMean of axes": _ints("ReduceMean", [1, -1], keepdims=0),
    "ReduceSum of axes": _ints("ReduceSum", [2], keepdims=1),
    "Reshape": _ints("Reshape", [0, -1, 10]),
    "Resize": (
        18,
        lambda b, x: b.op(
            "Resize",
            x,
            "",
            b.constant(np.array([1, 1, 2, 3], np.float32)),
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        ),
    ),
    "Slice": _ints("Slice", [1, -6], [100, -1], [2, 3], [2, 3]),
    "SpaceToDepth": (
        18,
        lambda b, x: b.op(
            "SpaceToDepth", b.op("Slice", x, *(b.constant([n]) for n in (0, 4, 2))), blocksize=2
        ),
    ),
    "Softmax of channels": _op("Softmax", axis=1),
    "Split": (18, _split),
    "Squeeze": (
        18,
        lambda b, x: b.op("Squeeze", b.op("Unsqueeze", x, b.constant([1])), b.constant([1])),
    ),
    "Transpose by order": _op("Transpose", perm=[2, 0, 3, 1]),
    "Unsqueeze": _ints("Unsqueeze", [0, 3]),
    "Where": (18, _where),
}


@pytest.mark.parametrize("case", CASES)
def test_operators(case: str) -> None:
    opset, build = CASES[case]
    b = ModelBuilder(case, opset=opset)
    x = b.input("x", SHAPE)
    b.output(build(b, b.op("Add", x, b.weight(*SHAPE, fan_in=16))))
    rng = np.random.default_rng(0)
    # Away from zero, where Relu, Abs and others have a corner.
    feeds: Feeds = {"x": rng.choice([-1.0, 1.0], SHAPE).astype(np.float32) * 2}
    found = _check(b.build(), feeds, step=1e-3)
    assert not found.stopped
    assert len(found.of) >= 1


def test_there_is_a_case_for_every_rule() -> None:
    built = set()
    for name, (opset, build) in CASES.items():
        b = ModelBuilder(name, opset=opset)
        build(b, b.input("x", SHAPE))
        built |= {node.op_type for node in b.nodes}
    assert set(RULES) <= built


@pytest.mark.parametrize("fixture", RUNNABLE, ids=str)
def test_every_fixture(fixture: Fixture) -> None:
    model = fixture.build()
    feeds = fixture.feeds(model)
    try:
        _prepared(model, feeds)
        run_model(model, feeds)
    except ModelError as error:
        pytest.skip(str(error))
    _check(model, feeds, step=1e-3, tolerance=0.1)


def _mlp(middle: Build) -> tuple[ir.Model, Feeds]:
    """A layer, something, and another layer."""
    b = ModelBuilder("mlp", opset=18)
    h = b.op("MatMul", b.input("x", (3, 4)), b.weight(4, 5, name="first"))
    b.output(b.op("MatMul", middle(b, h), b.weight(5, 2, name="last")))
    return b.build(), {"x": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)}


def test_operators_without_a_rule_stop_gradients() -> None:
    model, feeds = _mlp(lambda b, h: b.op("CumSum", h, b.constant(np.array(1))))
    found = _check(model, feeds)
    assert {w.name for w in found.of} == {"last"}
    assert list(found.stopped) == ["cumsum_0"]
    assert "no rule" in found.stopped["cumsum_0"]


def test_a_part_of_a_gradient_is_none() -> None:
    """Beside the operator without a rule there is a way for the gradient, but that is not all."""
    model, feeds = _mlp(lambda b, h: b.op("Add", h, b.op("CumSum", h, b.constant(np.array(1)))))
    found = _check(model, feeds)
    assert {w.name for w in found.of} == {"last"}


@pytest.mark.parametrize(
    "middle",
    [
        lambda b, h: b.op("Pad", h, b.constant([0, 0, 0, 0]), mode="reflect"),
        lambda b, h: b.op(
            "Slice", h, b.constant([-1]), b.constant([-9]), b.constant([1]), b.constant([-1])
        ),
        lambda b, h: b.op("Gather", h, b.constant([4, 3, 2, 1, 0]), axis=1),
        lambda b, h: b.op("Pow", b.op("Abs", h), b.op("Abs", h)),
    ],
    ids=["reflecting pad", "backward slice", "gather of several", "computed exponent"],
)
def test_uses_that_a_rule_cannot_treat_stop_gradients(middle: Build) -> None:
    model, feeds = _mlp(middle)
    found = _check(model, feeds)
    assert {w.name for w in found.of} == {"last"}
    assert len(found.stopped) == 1


def test_tied_weights_get_the_sum_of_both_uses() -> None:
    b = ModelBuilder("tied", opset=18)
    weight = b.weight(4, 4)
    h = b.op("Tanh", b.op("MatMul", b.input("x", (3, 4)), weight))
    b.output(b.op("MatMul", h, weight))
    feeds: Feeds = {"x": np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)}
    assert len(_check(b.build(), feeds).of) == 1
