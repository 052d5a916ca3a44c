"""The times of what onnxruntime executes belong to the nodes of the file."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.node_time import attribute, time_shares
from onnxcompress.runtime import NodeTime, SessionSettings, optimized_graph
from onnxcompress.savings import savings_of
from onnxcompress.targets import target_by_name
from tests.fixtures import FIXTURES, Fixture, fixture

SETTINGS = SessionSettings(threads=1)


def _prepared(case: Fixture) -> ir.Model:
    model = case.build()
    model_io.normalize(model)
    return model


@pytest.mark.parametrize("case", FIXTURES[:12], ids=lambda case: case.name)
def test_shares_are_of_nodes_of_the_file_and_add_up(case: Fixture, tmp_path: Path) -> None:
    model = _prepared(case)
    found = time_shares(model, case.feeds(model), SETTINGS, work_dir=tmp_path, runs=2)
    assert found.nodes.keys() <= {node.name for node in model.graph.all_nodes()}
    assert sum(found.nodes.values()) + found.elsewhere_ratio == pytest.approx(1.0)


def _times(executed: ir.Model, times: dict[str, float]) -> tuple[NodeTime, ...]:
    return tuple(
        NodeTime(node.name or "", node.op_type, times[node.op_type], 0.0)
        for node in executed.graph
        if node.op_type in times
    )


def test_fused_time_goes_to_the_convolution_and_not_to_its_activation() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 16, 8, 8] x) => (float[1, 16, 8, 8] z)
            <float[16, 16, 1, 1] w = {"""
        + ",".join(["1"] * 256)
        + """}> {
            y = Conv(x, w)
            z = Relu(y)
        }"""
    )
    for node in model.graph:
        node.name = f"the_{node.op_type}"
    executed = optimized_graph(model, SETTINGS)
    assert "Relu" not in [node.op_type for node in executed.graph]
    found = attribute(model, executed, _times(executed, {"Conv": 3.0, "ReorderOutput": 1.0}))
    assert found.nodes == {"the_Conv": 0.75}
    assert found.elsewhere_ratio == 0.25


def test_control_flow_is_not_counted_beside_what_is_inside() -> None:
    model = _prepared(fixture("conv_chain"))
    first, second = (node.name or "" for node in list(model.graph)[:2])
    times = (NodeTime(first, "If", 10.0, 0.8), NodeTime(second, "Relu", 2.5, 0.2))
    assert attribute(model, model, times).nodes == {second: 1.0}


def test_every_pass_says_what_it_could_do(tmp_path: Path) -> None:
    model = _prepared(fixture("conv_chain"))
    found = savings_of(model, target_by_name("x86-vnni"), tmp_path)
    by_pass = {entry.name: entry for entry in found.passes}
    assert {"prune", "quant", "fp16", "weights"} <= by_pass.keys()
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    saved = by_pass["quant"].saved_bytes
    assert saved is not None
    assert 0 < saved <= weights * 3 // 4
    assert all(entry.nodes or entry.reason for entry in found.passes)
    named = {treatment.name for node in found.nodes.values() for treatment in node}
    assert named == {entry.name for entry in found.passes if entry.nodes}
