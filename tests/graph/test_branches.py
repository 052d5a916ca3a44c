"""Ifs that take one branch on every run, and transpositions that hide the heads."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

from tests.builder import ModelBuilder
from tests.fixtures import Fixture, fixture
from tests.graph.law import error, outputs, prepared, sizes


def _branch(b: ModelBuilder, name: str, op: str, *inputs: str) -> onnx.GraphProto:
    inner = ModelBuilder(f"{b.name}_{name}")
    inner.share_names(b)
    result = inner.op(op, *inputs)
    info = onnx.ValueInfoProto(name=result)
    return helper.make_graph(inner.nodes, name, [], [info], inner.initializers)


def _if(b: ModelBuilder, condition: str, then: tuple[str, ...], other: tuple[str, ...]) -> str:
    return b.op(
        "If",
        condition,
        then_branch=_branch(b, "then_branch", *then),
        else_branch=_branch(b, "else_branch", *other),
    )


def rank_question() -> ir.Model:
    """Adds an axis if there are two: there are three."""
    b = ModelBuilder("rank_question")
    y = b.op("Relu", b.linear(b.input("x", [4, "batch", 5]), 5, 6))
    two = b.op("Equal", b.op("Size", b.op("Shape", y)), b.constant(np.array(2, np.int64)))
    y = _if(b, two, ("Unsqueeze", y, b.constant([0])), ("Identity", y))
    y = b.ops("LSTM", y, b.weight(1, 16, 6), b.weight(1, 16, 4), outputs=1, hidden_size=4)[0]
    b.output(b.op("MatMul", y, b.weight(4, 2)), [4, 1, "batch", 2])
    return b.build()


def length_question(*, recurrent: bool) -> ir.Model:
    """Drops the last axis if its length is one, as the LSTM behind it demands."""
    b = ModelBuilder(f"length_question_{recurrent}")
    y = b.op("Relu", b.conv(b.input("x", ["time", 3, "length"]), 3, 6, rank=1))
    length = b.op("Gather", b.op("Shape", y), b.constant([2]))
    one = b.op("Equal", length, b.constant([1]))
    y = _if(b, one, ("Squeeze", y, b.constant([2])), ("Identity", y))
    if not recurrent:
        b.output(b.op("ReduceSum", y, keepdims=0), [])
        return b.build()
    y = b.op("Unsqueeze", y, b.constant([1]))
    y = b.ops("LSTM", y, b.weight(1, 16, 6), b.weight(1, 16, 4), outputs=1, hidden_size=4)[0]
    b.output(b.op("MatMul", y, b.weight(4, 2)), ["time", 1, 1, 2])
    return b.build()


def _ifs(model: ir.Model) -> int:
    return sum(node.op_type == "If" for node in model.graph.all_nodes())


def test_a_known_condition_settles_its_if() -> None:
    case = Fixture("rank_question", rank_question)
    model = case.build()
    feeds = case.feeds(model)
    before = outputs(model, feeds)
    assert _ifs(prepared(model)) == 0
    assert error(before, outputs(model, feeds)) == 0
    assert sizes(case.build()) == {"matmul_0": 6, "lstm_0": 4}


def test_a_branch_that_would_fail_is_not_taken() -> None:
    model = length_question(recurrent=True)
    feeds = {"x": np.random.default_rng(0).standard_normal((5, 3, 1)).astype(np.float32)}
    before = outputs(model, feeds)
    assert _ifs(prepared(model)) == 0
    assert error(before, outputs(model, feeds)) == 0
    assert sizes(length_question(recurrent=True)) == {"conv_0": 6, "lstm_0": 4}


def test_branches_that_can_both_run_stay() -> None:
    model = prepared(length_question(recurrent=False))
    assert _ifs(model) == 1
    for length in (1, 4):
        feeds = {"x": np.ones((5, 3, length), np.float32)}
        assert error(outputs(length_question(recurrent=False), feeds), outputs(model, feeds)) == 0


def test_a_condition_of_the_data_stays() -> None:
    assert _ifs(prepared(fixture("if_model").build())) == 1


def test_an_if_that_makes_an_output_keeps_its_name() -> None:
    b = ModelBuilder("output_of_an_if")
    x = b.input("x", ["batch", 4])
    known = b.constant(np.array(True))
    b.output(_if(b, known, ("Relu", x), ("Tanh", x)), ["batch", 4])
    model = b.build()
    names = [v.name for v in model.graph.outputs]
    feeds = {"x": np.array([[-1, 0, 1, 2]], np.float32)}
    before = outputs(model, feeds)
    assert _ifs(prepared(model)) == 0
    assert [v.name for v in model.graph.outputs] == names
    assert error(before, outputs(model, feeds)) == 0


def merged_transpose(last: int) -> ir.Model:
    """Keys are transposed as ``[B·H, S, D]``."""
    b = ModelBuilder(f"merged_transpose_{last}")
    x = b.input("x", ["batch", 5, 8])
    q, k, v = (
        b.op("Transpose", b.op("Reshape", b.linear(x, 8, 12), b.constant([0, 0, 4, 3])),
             perm=[0, 2, 1, 3])
        for _ in range(3)
    )  # fmt: skip
    k = b.op("Transpose", b.op("Reshape", k, b.constant([-1, 5, 3])), perm=[0, 2, 1])
    k = b.op("Reshape", k, b.constant([-1, last, 12 // last, 5]))
    if last == 4:
        scores = b.op("MatMul", q, k)
        y = b.op("MatMul", b.op("Softmax", scores, axis=-1), v)
    else:
        y = b.op("Add", v, b.op("ReduceMean", k, axes=[1, 2, 3], keepdims=1))
    y = b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 1, 3]), b.constant([0, 0, 12]))
    b.output(b.linear(y, 12, 8), ["batch", 5, 8])
    return b.build()


def test_heads_are_found_behind_a_merged_transposition() -> None:
    case = Fixture("merged_transpose", lambda: merged_transpose(4))
    assert sizes(case.build()) == {"matmul_0": 4}
    model = case.build()
    feeds = case.feeds(model)
    before = outputs(model, feeds)
    assert error(before, outputs(prepared(model), feeds)) <= 1e-6


def test_other_reshapes_around_a_transposition_stay() -> None:
    model = prepared(merged_transpose(2))
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)}
    assert error(outputs(merged_transpose(2), feeds), outputs(model, feeds)) <= 1e-6
    assert [n.op_type for n in model.graph].count("Reshape") == 5
