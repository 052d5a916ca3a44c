from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.passes.share.duplicates import Merged, merge_duplicates
from onnxcompress.runtime import optimized_graph
from tests.builder import Array, ModelBuilder
from tests.fixtures import FIXTURES, Fixture
from tests.running import SETTINGS, largest_error, run_model

RNG = np.random.default_rng(7)
WEIGHT = RNG.normal(size=(24, 24)).astype(np.float32)
KERNEL = RNG.normal(size=(8, 8, 3, 3)).astype(np.float32)


def two_products(second: Array, op: str = "MatMul", trans_b: int | None = None) -> ir.Model:
    b = ModelBuilder("two_products")
    x = b.input("x", ["batch", 24])
    first = b.op(op, x, b.constant(WEIGHT, "a"))
    b.output(b.op(op, first, b.constant(second, "b"), transB=trans_b))
    return finished(b)


def two_convolutions(second: Array) -> ir.Model:
    b = ModelBuilder("two_convolutions")
    x = b.input("x", ["batch", 8, 6, 6])
    pads = [1, 1, 1, 1]
    first = b.op("Conv", x, b.constant(KERNEL, "a"), pads=pads)
    b.output(b.op("Conv", first, b.constant(second, "b"), pads=pads))
    return finished(b)


def finished(b: ModelBuilder) -> ir.Model:
    model = b.build()
    model_io.normalize(model)
    return model


def merged(model: ir.Model, *, scaled: bool = True) -> tuple[Merged, float]:
    """Merge, and how far the outputs moved."""
    shapes = {v.name or "": v.shape for v in model.graph.inputs}
    feeds = {
        name: np.random.default_rng(0)
        .normal(size=[d if isinstance(d, int) else 3 for d in shape or ()])
        .astype(np.float32)
        for name, shape in shapes.items()
    }
    expected = run_model(model, feeds)
    found = merge_duplicates(model, scaled=scaled)
    model_io.infer_shapes(model)
    model_io.check(model)
    return found, largest_error(run_model(model, feeds), expected)


CASES: dict[str, tuple[Callable[[], ir.Model], str]] = {
    "equal": (lambda: two_products(WEIGHT.copy()), "merged with 'a', which is equal"),
    "transposed": (lambda: two_products(WEIGHT.T.copy()), "merged as a transposed 'a'"),
    "gemm": (lambda: two_products(WEIGHT.T.copy(), "Gemm"), "merged as a transposed 'a'"),
    "gemm_back": (
        lambda: two_products(WEIGHT.T.copy(), "Gemm", 1),
        "merged as a transposed 'a'",
    ),
    "axes": (
        lambda: two_convolutions(KERNEL.transpose(1, 0, 3, 2).copy()),
        "merged as a transposed 'a'",
    ),
    "power_of_two": (lambda: two_products(WEIGHT * -0.25), "merged as a multiple of 'a'"),
}


@pytest.mark.parametrize("case", CASES)
def test_merged_duplicates_leave_outputs_bit_equal(case: str, tmp_path: Path) -> None:
    build, what = CASES[case]
    model = build()
    before = len(optimized_graph(model, SETTINGS, tmp_path).graph)
    found, error = merged(model)
    assert [change.what for change in found.changes] == [what]
    assert "b" not in model.graph.initializers
    assert error == 0.0
    assert found.saved_bytes >= WEIGHT.nbytes - 4
    assert len(optimized_graph(model, SETTINGS, tmp_path).graph) == before


def test_flags_of_gemm_need_no_node() -> None:
    model = two_products(WEIGHT.T.copy(), "Gemm")
    merged(model)
    assert [node.op_type for node in model.graph] == ["Gemm", "Gemm"]
    assert model.graph[1].attributes["transB"].as_int() == 1


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_multiples_are_equal_to_rounding(axis: int | None) -> None:
    shape = [1, 1]
    if axis is not None:
        shape[axis] = 24
    factor = np.random.default_rng(1).uniform(0.5, 2, shape).astype(np.float32)
    model = two_products(WEIGHT * factor)
    found, error = merged(model)
    assert [change.what for change in found.changes] == ["merged as a multiple of 'a'"]
    assert error < 1e-6
    assert found.saved_bytes == WEIGHT.nbytes - factor.nbytes


def test_multiples_stay_where_exactness_is_asked_for() -> None:
    found, error = merged(two_products(WEIGHT * 2), scaled=False)
    assert found == Merged((), 0)
    assert error == 0.0


def test_what_only_looks_alike_stays() -> None:
    shuffled = WEIGHT.reshape(-1)[::-1].reshape(24, 24).copy()
    assert merged(two_products(shuffled))[0].changes == ()
    almost = WEIGHT.copy()
    almost[3, 4] += np.float32(1e-3)
    assert merged(two_products(almost))[0].changes == ()
    assert merged(two_products(np.zeros((24, 24), np.float32)))[0].changes == ()


def test_the_same_numbers_in_another_shape() -> None:
    b = ModelBuilder("shapes")
    x = b.input("x", ["batch", 8])
    pairs = RNG.normal(size=(8, 36)).astype(np.float32)
    first = b.op("MatMul", x, b.constant(pairs, "a"))
    second = b.op(
        "MatMul",
        b.op("MatMul", x, b.constant(pairs.reshape(8, 36).copy(), "c")),
        b.constant(pairs.reshape(36, 8).copy(), "b"),
    )
    b.output(first)
    b.output(second)
    found, error = merged(finished(b))
    assert [c.what for c in found.changes] == [
        "merged with 'a', which is equal",
        "merged as a reshaped 'a'",
    ]
    assert error == 0.0


def test_branches_share_through_the_graph_around_them() -> None:
    b = ModelBuilder("branches")
    x = b.input("x", [2, 24])
    branches = {}
    for name in ("then_branch", "else_branch"):
        body = ModelBuilder(f"branches_{name}")
        body.share_names(b)
        product = body.op("MatMul", x, body.constant(WEIGHT, f"w_{name}"))
        branches[name] = b.subgraph(name, product, body)
    total = b.op("ReduceSum", x, keepdims=0)
    b.output(b.op("If", b.op("Greater", total, b.constant(0.5)), **branches), [2, 24])
    model = finished(b)
    found, error = merged(model)
    assert len(found.changes) == 1
    assert error == 0.0
    stored = [v.const_value for g in model.graphs() for v in g.initializers.values()]
    assert sum(t.nbytes for t in stored if t is not None) == WEIGHT.nbytes + 4


@pytest.mark.parametrize("case", FIXTURES, ids=str)
def test_fixtures_run_as_before(case: Fixture) -> None:
    model = case.build()
    model_io.normalize(model)
    original = model.clone()
    merge_duplicates(model, scaled=True)
    model_io.infer_shapes(model)
    model_io.check(model)
    if case.runs:
        feeds = case.feeds(original)
        assert largest_error(run_model(model, feeds), run_model(original, feeds)) < 1e-6
