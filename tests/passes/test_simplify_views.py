"""Nodes that only look at a tensor with other axes of length one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxcompress import model_io
from onnxcompress.passes._views import VIEWS, merge_views
from onnxcompress.passes.simplify import SimplifyOptions, SimplifyPass
from tests.builder import Array, Dim, ModelBuilder
from tests.running import context, run_model


def ops(model: ir.Model) -> list[str]:
    """Operators, those out that do nothing."""
    found = [node.op_type for node in model.graph.all_nodes()]
    return [op_type for op_type in found if op_type not in {"Constant", "Identity"}]


def axes(b: ModelBuilder, *values: int) -> str:
    return b.constant(np.array(values, np.int64))


def built(b: ModelBuilder) -> ir.Model:
    model = b.build()
    model_io.normalize(model)
    return model


def merged(model: ir.Model) -> ir.Model:
    """A copy with views merged and those that nothing reads any more out."""
    copy = model.clone()
    merge_views(copy)
    for node in reversed(list(copy.graph)):
        if not any(v.uses() or v.is_graph_output() for v in node.outputs):
            copy.graph.remove(node)
    return copy


def chain(b: ModelBuilder, value: str, *steps: tuple[str, tuple[int, ...]]) -> str:
    for op_type, numbers in steps:
        if op_type == "Transpose":
            value = b.op("Transpose", value, perm=list(numbers))
        else:
            value = b.op(op_type, value, axes(b, *numbers))
    return value


@pytest.mark.parametrize(
    ("shape", "steps", "expected"),
    [
        ((1, 1, 8), [("Squeeze", (0,)), ("Unsqueeze", (1,))], []),
        ((1, 1, 8), [("Transpose", (1, 0, 2))], []),
        ((1, 1, 8, 1), [("Squeeze", (1, 3)), ("Unsqueeze", (0,))], ["Squeeze"]),
        ((1, 1, 1, 8), [("Transpose", (2, 1, 0, 3)), ("Squeeze", (1,))], ["Squeeze"]),
        ((5, 8), [("Unsqueeze", (0,)), ("Transpose", (1, 0, 2))], ["Unsqueeze"]),
        ((5, 1, 8), [("Transpose", (1, 0, 2)), ("Unsqueeze", (3,))], ["Reshape"]),
        # One dynamic axis, wherever it goes.
        (("n", 1, 8), [("Squeeze", (1,)), ("Unsqueeze", (2,))], ["Reshape"]),
        (("n", 1, 8), [("Transpose", (1, 0, 2)), ("Unsqueeze", (3,))], ["Reshape"]),
        (("n", 1, 8), [("Squeeze", (1,)), ("Unsqueeze", (1,))], []),
        # Two of them that stay where they are.
        (("n", "t", 1), [("Squeeze", (2,)), ("Unsqueeze", (0,))], ["Squeeze", "Unsqueeze"]),
        (("n", "t", 1), [("Squeeze", (2,)), ("Unsqueeze", (2,))], []),
        # Elements move, or an axis could have any length.
        ((5, 1, 8), [("Transpose", (2, 1, 0)), ("Squeeze", (1,))], ["Transpose", "Squeeze"]),
        (("n", 5), [("Transpose", (1, 0)), ("Unsqueeze", (0,))], ["Transpose", "Unsqueeze"]),
    ],
)
def test_a_chain_of_views_becomes_one_or_none(
    shape: tuple[Dim, ...], steps: list[tuple[str, tuple[int, ...]]], expected: list[str]
) -> None:
    b = ModelBuilder("views")
    value = chain(b, b.op("Neg", b.input("x", shape)), *steps)
    b.output(b.op("Neg", value))
    model = built(b)
    after = merged(model)
    assert ops(after) == ["Neg", *expected, "Neg"]
    lengths = [n if isinstance(n, int) else 3 + place for place, n in enumerate(shape)]
    feeds = {"x": np.random.default_rng(0).normal(size=lengths).astype(np.float32)}
    for name, array in run_model(model, feeds).items():
        np.testing.assert_array_equal(run_model(after, feeds)[name], array)


@st.composite
def _steps(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[str, tuple[int, ...]]]]:
    """A shape, and nodes that add, remove and move axes, of length one mostly."""
    shape = tuple(draw(st.lists(st.sampled_from([1, 1, 2, 3]), min_size=1, max_size=4)))
    lengths = list(shape)
    steps: list[tuple[str, tuple[int, ...]]] = []
    for _ in range(draw(st.integers(1, 5))):
        ones = [axis for axis, length in enumerate(lengths) if length == 1]
        kinds = ["Transpose"]
        kinds += ["Squeeze"] if ones and len(lengths) > 1 else []
        kinds += ["Unsqueeze"] if len(lengths) < 6 else []
        kind = draw(st.sampled_from(kinds))
        if kind == "Squeeze":
            axis = draw(st.sampled_from(ones))
            del lengths[axis]
            steps.append((kind, (axis,)))
        elif kind == "Unsqueeze":
            axis = draw(st.integers(0, len(lengths)))
            lengths.insert(axis, 1)
            steps.append((kind, (axis,)))
        else:
            perm = tuple(draw(st.permutations(range(len(lengths)))))
            lengths = [lengths[axis] for axis in perm]
            steps.append((kind, perm))
    return shape, steps


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=_steps(), dynamic=st.booleans(), opset=st.sampled_from([11, 17]))
def test_views_compute_what_they_did_in_no_more_nodes(
    case: tuple[tuple[int, ...], list[tuple[str, tuple[int, ...]]]], dynamic: bool, opset: int
) -> None:
    shape, steps = case
    b = ModelBuilder("any", opset=opset)
    named = [length if length == 1 or not dynamic else f"d{i}" for i, length in enumerate(shape)]
    value = b.op("Neg", b.input("x", named))
    for op_type, numbers in steps:
        if op_type == "Transpose":
            value = b.op(op_type, value, perm=list(numbers))
        elif opset < 13:
            value = b.op(op_type, value, axes=list(numbers))
        else:
            value = b.op(op_type, value, axes(b, *numbers))
        b.output(b.op("Neg", value))
    model = b.build()
    model_io.infer_shapes(model)
    after = merged(model)
    model_io.check(after)
    assert len(ops(after)) <= len(ops(model))
    feeds = {"x": np.arange(np.prod(shape), dtype=np.float32).reshape(shape)}
    found = run_model(after, feeds)
    for name, array in run_model(model, feeds).items():
        np.testing.assert_array_equal(found[name], array)


def test_what_others_read_stays() -> None:
    b = ModelBuilder("read")
    once = b.op("Squeeze", b.op("Neg", b.input("x", [1, 1, 8])), axes(b, 0))
    b.output(b.op("Unsqueeze", once, axes(b, 0)))
    b.output(b.op("Neg", once))
    assert ops(merged(built(b))) == ["Neg", "Squeeze", "Neg"]


def test_a_squeeze_that_looks_for_its_axes_is_no_view() -> None:
    b = ModelBuilder("looks")
    value = b.op("Squeeze", b.op("Neg", b.input("x", [1, "n", 8])))
    b.output(b.op("Unsqueeze", value, axes(b, 0)), [1, "m", 8])
    assert merge_views(built(b)) == 0


def test_the_state_of_a_recurrent_layer_is_read_and_written_directly(tmp_path: Path) -> None:
    b = ModelBuilder("state")
    x = b.op("Transpose", b.input("x", [1, 1, 6]), perm=[1, 0, 2])
    state = b.input("state", [1, 1, 4, 2])
    parts = []
    for place in range(2):
        bounds = [axes(b, n) for n in (place, place + 1, 3)]
        part = b.op("Squeeze", b.op("Slice", state, *bounds), axes(b, 1, 3))
        parts.append(b.op("Unsqueeze", part, axes(b, 0)))
    weights = [b.constant(b.rng.normal(size=(1, 16, n)).astype(np.float32)) for n in (6, 4)]
    y, h, c = b.ops("LSTM", x, *weights, "", "", *parts, outputs=3, hidden_size=4)
    b.output(b.op("Squeeze", b.op("Transpose", y, perm=[2, 1, 0, 3]), axes(b, 1)))
    ends = [
        b.op("Unsqueeze", b.op("Unsqueeze", b.op("Squeeze", v, axes(b, 0)), axes(b, 1)), axes(b, 3))
        for v in (h, c)
    ]
    b.output(b.op("Concat", *ends, axis=-1))
    model = built(b)
    feeds: dict[str, Array] = {
        v.name or "": np.asarray(
            b.rng.normal(size=[int(str(n)) for n in v.shape or ()]), np.float32
        )
        for v in model.graph.inputs
    }
    expected = run_model(model, feeds)
    SimplifyPass(SimplifyOptions(onnxsim=False)).run(model, context(tmp_path))
    for name, array in run_model(model, feeds).items():
        np.testing.assert_array_equal(array, expected[name])
    assert sum(op_type in VIEWS for op_type in ops(model)) == 5
    assert "Transpose" not in ops(model)
