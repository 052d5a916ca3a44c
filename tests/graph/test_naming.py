from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.graph.naming import Namer, fresh_name, shorten, used_names
from tests.fixtures import FIXTURES, Fixture, fixture
from tests.running import run_model as run


def test_a_free_name_is_kept() -> None:
    assert (
        fresh_name(fixture("conv_chain").build(), "conv_0_out/fold_bias") == "conv_0_out/fold_bias"
    )


def test_a_taken_name_gets_the_first_free_number() -> None:
    model = fixture("conv_chain").build()
    assert fresh_name(model, "conv_0") == "conv_0_1"  # a node
    assert fresh_name(model, "conv_0_out") == "conv_0_out_1"  # a value
    assert fresh_name(model, "x") == "x_1"  # a graph input
    assert fresh_name(model, "const_0") == "const_0_1"  # an initializer


def test_a_namer_does_not_hand_out_a_name_twice() -> None:
    namer = Namer(fixture("conv_chain").build())
    assert [namer.value("new"), namer.node("new"), namer.value("new")] == ["new", "new_1", "new_2"]


def test_an_empty_name_is_never_given() -> None:
    assert Namer(fixture("conv_chain").build()).value("") == "_1"


def test_names_inside_subgraphs_are_taken() -> None:
    model = fixture("if_model").build()
    inner = [node for graph in model.graph.subgraphs() for node in graph]
    assert inner
    for node in inner:
        assert fresh_name(model, node.name or "") != node.name
        assert fresh_name(model, node.outputs[0].name or "") != node.outputs[0].name


@pytest.mark.parametrize("case", FIXTURES, ids=str)
def test_all_names_are_seen(case: Fixture) -> None:
    model = case.build()
    used = used_names(model)
    for node in model.graph.all_nodes():
        assert node.name in used
        for value in (*node.inputs, *node.outputs):
            assert value is None or not value.name or value.name in used


def test_names_of_functions_are_seen() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        main (float[2] x) => (float[2] y) { y = local.twice(x) }
        <opset_import: ["" : 17], domain: "local"> twice (a) => (c) { b = Relu(a) c = Add(b, b) }"""
    used = used_names(ir.from_onnx_text(text))
    assert {"x", "y", "a", "b", "c"} <= used


@pytest.mark.parametrize("case", [c for c in FIXTURES if c.runs], ids=str)
def test_short_names_change_nothing_but_names(case: Fixture) -> None:
    model = case.build()
    model_io.normalize(model)
    before = run(model, case.feeds())
    kept = {n.name for n in list(model.graph)[::2]} | {n.outputs[0].name for n in model.graph}
    some = model_io.clone(model)
    shorten(some, {name for name in kept if name})
    assert {n.name for n in some.graph} - {""} == {n.name for n in list(model.graph)[::2]}
    assert [n.outputs[0].name for n in some.graph] == [n.outputs[0].name for n in model.graph]
    every = model_io.clone(model)
    assert shorten(every, ()) > 0
    ends = {v.name for g in every.graphs() for v in (*g.inputs, *g.outputs)}
    assert all(len(name) <= 3 for name in used_names(every) - ends)
    for renamed in (some, every):
        model_io.check(renamed)
        after = run(renamed, case.feeds())
        assert after.keys() == before.keys()
        for name, array in before.items():
            np.testing.assert_array_equal(after[name], array)


def test_short_names_are_unique_where_branches_use_the_same_names() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
        m (bool c, float[2] a) => (float[2] y) {
            long = Neg(a)
            y = If(c) <then_branch = t () => (float[2] p) { inner = Abs(long) p = Neg(inner) },
                       else_branch = e () => (float[2] p) { inner = Exp(long) p = Abs(inner) }> }"""
    model = ir.from_onnx_text(text)
    model_io.name_nodes(model)
    feeds = {"c": np.array(False), "a": np.array([1, 2], np.float32)}
    before = run(model, feeds)["y"]
    assert shorten(model, ()) == 3 + 6  # long, two times inner, and six nodes
    assert {"c", "a", "y", "p", "b", "d", "e"} == used_names(model)  # those in use are passed over
    np.testing.assert_array_equal(run(model, feeds)["y"], before)
