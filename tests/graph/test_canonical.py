"""Canonical graphs compute the same and say more."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.graph.canonical import canonicalize
from onnxcompress.graph.constants import constant_of
from onnxcompress.graph.probe import probe
from tests.builder import ModelBuilder
from tests.fixtures import RUNNABLE, Fixture
from tests.graph import builders
from tests.graph.law import error, outputs


def canonical(b: ModelBuilder) -> ir.Model:
    model = b.build()
    model_io.normalize(model)
    canonicalize(model)
    return model


def node(model: ir.Model, op_type: str) -> ir.Node:
    return next(n for n in model.graph.all_nodes() if n.op_type == op_type)


@pytest.mark.parametrize("case", [*RUNNABLE, *builders.FIXTURES], ids=str)
def test_results_stay(case: Fixture) -> None:
    model = case.build()
    model_io.normalize(model)
    feeds = case.feeds(model)
    before = outputs(model, feeds)
    canonicalize(model)
    model_io.check(model)
    assert error(before, outputs(model, feeds)) <= 1e-6
    once = Counter(n.op_type for n in model.graph.all_nodes())
    canonicalize(model)
    assert Counter(n.op_type for n in model.graph.all_nodes()) == once


def test_computed_reshape_target_becomes_constant() -> None:
    b = ModelBuilder("computed_target")
    x = b.input("x", ["batch", "length", 12])
    shape = b.op("Shape", x)
    batch, length = (b.op("Gather", shape, b.constant([i])) for i in range(2))
    target = b.op("Concat", batch, length, b.constant([3]), b.constant([4]), axis=0)
    b.output(b.op("Reshape", x, target))
    model = canonical(b)
    assert len(model.graph) == 1
    target_value = constant_of(node(model, "Reshape").inputs[1])
    np.testing.assert_array_equal(target_value, [0, 0, 3, 4])


def test_merged_dynamic_axes_become_minus_one() -> None:
    b = ModelBuilder("merged_target")
    x = b.input("x", ["batch", "length", 12])
    shape = b.op("Shape", x)
    batch, length = (b.op("Gather", shape, b.constant([i])) for i in range(2))
    rows = b.op("Mul", batch, length)
    b.output(b.op("Reshape", x, b.op("Concat", rows, b.constant([12]), axis=0)))
    np.testing.assert_array_equal(constant_of(node(canonical(b), "Reshape").inputs[1]), [-1, 12])


def test_a_question_about_the_batch_is_not_answered() -> None:
    """Both primes differ from one, yet the batch may be one."""
    b = ModelBuilder("asks_batch")
    x = b.input("x", ["batch", 4])
    batch = b.op("Gather", b.op("Shape", x), b.constant(np.array(0, np.int64)))
    single = b.op("Equal", batch, b.constant(np.array(1, np.int64)))
    b.output(b.op("Where", single, x, b.op("Neg", x)))
    model = canonical(b)
    for rows in (1, 2):
        feeds = {"x": np.ones((rows, 4), np.float32)}
        (y,) = outputs(model, feeds).values()
        assert y[0, 0] == (1 if rows == 1 else -1)


def test_a_clamped_length_is_not_static() -> None:
    b = ModelBuilder("clamped")
    x = b.input("x", ["batch", "length", 4])
    length = b.op("Gather", b.op("Shape", x), b.constant([1]))
    ends = b.op("Max", length, b.constant([600]))
    b.output(b.op("Expand", b.weight(1), ends))
    model = b.build()
    model_io.normalize(model)
    assert probe(model).of(model.graph.outputs[0]) == (None,)


def test_small_static_arithmetic_is_folded_but_weights_are_not() -> None:
    b = ModelBuilder("folds")
    x = b.input("x", ["batch", 4])
    zeros = b.op("ConstantOfShape", b.constant([1, 4]))
    weight = b.op("Transpose", b.weight(50, 4), perm=[1, 0])
    b.output(b.op("MatMul", b.op("Add", x, zeros), weight))
    model = canonical(b)
    assert [n.op_type for n in model.graph] == ["Transpose", "Add", "MatMul"]


def test_squeeze_names_its_axes() -> None:
    b = ModelBuilder("squeezes")
    b.output(b.op("Squeeze", b.input("x", [1, 3, 1, 4])))
    model = canonical(b)
    np.testing.assert_array_equal(constant_of(node(model, "Squeeze").inputs[1]), [0, 2])


def test_zero_states_are_dropped_and_others_kept() -> None:
    model = builders.bidirectional()
    model_io.normalize(model)
    canonicalize(model)
    assert len([v for v in node(model, "LSTM").inputs if v is not None]) == 4
    b = ModelBuilder("started")
    x = b.input("x", [3, 1, 2])
    y, _ = b.ops(
        "RNN", x, b.weight(1, 4, 2), b.weight(1, 4, 4), "", "", b.weight(1, 1, 4), outputs=2,
        hidden_size=4,
    )  # fmt: skip
    b.output(y)
    assert len([v for v in node(canonical(b), "RNN").inputs if v is not None]) == 4


def test_shared_vectors_get_copies_and_matrices_stay_tied() -> None:
    model = builders.shared_parameters()
    model_io.normalize(model)
    canonicalize(model)
    shapes = Counter(tuple(v.shape or ()) for v in model.graph.initializers.values())
    assert shapes[(8,)] == 2
    assert shapes[(8, 8)] == 1


def test_values_of_branches_get_names_of_their_own() -> None:
    b = ModelBuilder("twins")
    x = b.input("x", [2, 4])
    flag = b.input("flag", [], np.bool_)
    branches = []
    for scale in (1.0, 2.0):
        inner = ModelBuilder(f"twin_{scale}")
        y = inner.op("Mul", x, inner.constant(scale))
        branches.append(inner.subgraph("branch", y, inner))
    b.output(b.op("If", flag, then_branch=branches[0], else_branch=branches[1]), [2, 4])
    model = canonical(b)
    names = [o.name for n in model.graph.all_nodes() for o in n.outputs]
    names += [v.name for g in model.graphs() for v in g.initializers.values()]
    assert len(names) == len(set(names))
