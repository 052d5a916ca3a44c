"""What inspect --groups says: sizes, shares, coverage, reasons, and lists that stay short."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import inspection, model_io
from onnxcompress.groups import summarize
from onnxcompress.report import inspection as pages
from onnxcompress.report import terminal
from tests.builder import ModelBuilder
from tests.fixtures import fixture


def _normalized(model: ir.Model) -> ir.Model:
    model_io.normalize(model)
    return model


def test_a_group_knows_its_weights() -> None:
    found = summarize(_normalized(fixture("mlp_gemm").build()))
    first = found.groups[0]
    # 24 rows of [24, 10] with biases, and 24 columns of [12, 24].
    b = fixture("mlp_gemm").build()
    shapes = {v.name: v.shape.numpy() for v in b.graph.initializers.values() if v.shape}
    rows, columns = (s for s in shapes.values() if len(s) == 2 and 24 in s)
    assert first.units == 24
    assert first.width == 1
    assert first.parameters == np.prod(rows) + 24 + np.prod(columns)
    assert found.coverage == 1.0
    assert not found.untouched
    assert not found.states


def test_heads_count_their_dimensions_and_states_are_named() -> None:
    found = summarize(_normalized(fixture("primitive_transformer").build()))
    assert {(g.units, g.width) for g in found.groups} == {(4, 4), (32, 1)}
    found = summarize(_normalized(fixture("stateful_gru").build()))
    assert found.states == ("gru_0_out1",)


def test_reasons_say_which_share_they_hold() -> None:
    b = ModelBuilder("held")
    y = b.op("Softmax", b.linear(b.input("x", [1, 4]), 4, 6), axis=-1)
    b.output(b.op("MatMul", y, b.weight(6, 3)))
    found = summarize(_normalized(b.build()))
    assert found.coverage == 0.0
    assert found.untouched == ("matmul_0", "matmul_1")
    softmax, output = found.frozen
    assert "Softmax" in softmax.reason
    # matmul_0 makes the channels of the one, matmul_1 those of the other.
    assert (softmax.macs_ratio, output.macs_ratio) == pytest.approx((4 / 7, 3 / 7))


def test_shares_stay_below_one_in_branches() -> None:
    found = summarize(_normalized(fixture("if_model").build()))
    assert all(0 <= g.macs_ratio <= 1 for g in found.groups)
    assert all(g.last_stays for g in found.groups)
    assert all(0 <= f.macs_ratio <= 1 for f in found.frozen)


def test_long_lists_end_in_a_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    b = ModelBuilder("many_groups")
    y = b.input("x", [1, 4])
    for _ in range(5):
        y = b.op("Relu", b.linear(y, 4, 4))
    b.output(b.linear(y, 4, 2))
    path = tmp_path / "many.onnx"
    model_io.save(b.build(), path)
    found = inspection.inspect(path, groups=True, top=2)
    assert found.groups is not None
    assert len(found.groups) == 5
    terminal.show(pages.inspection(found))
    shown = capsys.readouterr().out
    assert "and 3 more groups: --top 5 lists all" in shown
    assert "coverage  100" in shown
    terminal.show(pages.inspection(inspection.inspect(path, groups=True, top=5)))
    assert "more groups" not in capsys.readouterr().out
