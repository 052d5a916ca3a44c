"""What simplify removes because it is there twice, or for nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.passes._rewrites import Level, rewrite
from onnxcompress.passes.simplify import SimplifyOptions, SimplifyPass
from tests.builder import ModelBuilder
from tests.running import context, run_model

WEIGHT = np.random.default_rng(3).normal(size=(8, 8)).astype(np.float32)
X = np.random.default_rng(4).normal(size=(2, 8)).astype(np.float32)


def simplified(b: ModelBuilder, folder: Path) -> ir.Model:
    """Simplified, with the outputs as before."""
    model = b.build()
    model_io.normalize(model)
    feeds = {v.name or "": X for v in model.graph.inputs}
    expected = run_model(model, feeds)
    SimplifyPass(SimplifyOptions(onnxsim=False)).run(model, context(folder))
    for name, array in run_model(model, feeds).items():
        np.testing.assert_array_equal(array, expected[name])
    return model


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.all_nodes())


def test_equal_expressions_are_computed_once(tmp_path: Path) -> None:
    b = ModelBuilder("twice")
    x = b.input("x", ["batch", 8])
    # Equal weights under two names, so that equality shows only after they are merged.
    halves = [
        b.op("Relu", b.op("Gemm", x, b.constant(WEIGHT, f"w{i}"), transB=1)) for i in range(2)
    ]
    b.output(b.op("Add", *halves))
    model = simplified(b, tmp_path)
    assert ops(model) == {"Gemm": 1, "Relu": 1, "Add": 1}
    assert len(model.graph.initializers) == 1


def test_expressions_that_differ_in_an_attribute_stay(tmp_path: Path) -> None:
    b = ModelBuilder("attributes")
    x, weight = b.input("x", ["batch", 8]), b.constant(WEIGHT, "w")
    b.output(b.op("Add", b.op("Gemm", x, weight), b.op("Gemm", x, weight, transB=1)))
    assert ops(simplified(b, tmp_path)) == {"Gemm": 2, "Add": 1}


def test_chains_of_identities_go_and_outputs_keep_their_names(tmp_path: Path) -> None:
    b = ModelBuilder("identities")
    x = b.input("x", ["batch", 8])
    y = b.op("Identity", b.op("Identity", b.op("Tanh", b.op("Identity", x))))
    last = b.op("Identity", b.op("Neg", y))
    b.output(last)
    model = simplified(b, tmp_path)
    assert ops(model) == {"Tanh": 1, "Neg": 1}
    assert model.graph.outputs[0].name == last


def test_an_output_that_is_its_input_keeps_its_identity(tmp_path: Path) -> None:
    b = ModelBuilder("through")
    x = b.input("x", ["batch", 8])
    b.output(b.op("Identity", x))
    b.output(b.op("Exp", x))
    assert ops(simplified(b, tmp_path)) == {"Identity": 1, "Exp": 1}


def test_duplicates_within_a_branch(tmp_path: Path) -> None:
    b = ModelBuilder("branch")
    x = b.input("x", ["batch", 8])
    branches = {}
    for name in ("then_branch", "else_branch"):
        inner = ModelBuilder(f"branch_{name}")
        inner.share_names(b)
        parts = [
            inner.op("MatMul", x, inner.constant(WEIGHT + (name == "else_branch"), f"{name}{i}"))
            for i in range(2)
        ]
        inner.weight(9, 9, name=f"unused_{name}")
        branches[name] = b.subgraph(name, inner.op("Add", *parts), inner)
    total = b.op("ReduceSum", x, keepdims=0)
    b.output(b.op("If", b.op("Greater", total, b.constant(0.5)), **branches), ["batch", 8])
    model = simplified(b, tmp_path)
    assert ops(model)["MatMul"] == 2
    stored = [v.const_value for g in model.graphs() for v in g.initializers.values()]
    assert sum(t.nbytes for t in stored if t is not None) == 2 * WEIGHT.nbytes + 4


def test_unused_constants_go(tmp_path: Path) -> None:
    b = ModelBuilder("unused")
    b.output(b.op("MatMul", b.input("x", ["batch", 8]), b.constant(WEIGHT, "w")))
    b.weight(30, 30, name="unused")
    b.op("Sigmoid", b.constant(WEIGHT * 2, "dead"))
    model = simplified(b, tmp_path)
    assert list(model.graph.initializers) == ["w"]


@pytest.mark.parametrize("level", list(Level))
def test_random_numbers_are_not_duplicates(level: Level) -> None:
    b = ModelBuilder("random")
    x = b.input("x", [2, 8])
    b.output(b.op("Sub", b.op("RandomNormalLike", x), b.op("RandomNormalLike", x)))
    model = b.build()
    model_io.normalize(model)
    rewrite(model, level, max_folded_bytes=1 << 20)
    assert ops(model)["RandomNormalLike"] == 2


def test_large_equal_constants_are_left_to_share(tmp_path: Path) -> None:
    b = ModelBuilder("large")
    x = b.input("x", ["batch", 8])
    wide = np.random.default_rng(0).normal(size=(8, 9000)).astype(np.float32)
    b.output(b.op("Sub", *(b.op("MatMul", x, b.constant(wide, f"w{i}")) for i in range(2))))
    model = simplified(b, tmp_path)
    assert ops(model)["MatMul"] == 2
