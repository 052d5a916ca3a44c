"""New weights of recurrent layers: what removed cells told the others is learnt from the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.interface import input_specs
from onnxcompress.passes.base import PassReport
from onnxcompress.passes.prune import PruneOptions, PrunePass
from tests.builder import Array, ModelBuilder
from tests.running import context, largest_error, run_model

GATES = {"RNN": 1, "LSTM": 4}
STEPS, INPUTS, CELLS, TWINS = 6, 5, 8, 4


def doubled(kind: str, direction: str, *, bias: bool = True, state: bool = False) -> ir.Model:
    """A recurrent layer of twelve cells, four of which do what four others do.

    Each of the four others is read by all cells as well, so removing one changes every gate.
    """
    b = ModelBuilder(f"{kind}_{direction}")
    x = b.op("Transpose", b.input("x", ["batch", STEPS, INPUTS]), perm=[1, 0, 2])
    gates, size = GATES[kind], CELLS + TWINS
    twin = np.concatenate([np.arange(CELLS), np.arange(TWINS)])
    rows = np.concatenate([g * CELLS + twin for g in range(gates)])
    made = b.rng.normal(size=(1, gates * CELLS, INPUTS)).astype(np.float32)
    read = b.rng.normal(size=(1, gates * CELLS, size)).astype(np.float32) / 2
    offset = b.rng.normal(size=(1, 2, gates * CELLS)).astype(np.float32) / 4
    inputs = [b.constant(made[:, rows], "W"), b.constant(read[:, rows], "R")]
    if bias:
        inputs.append(b.constant(offset[:, :, rows].reshape(1, -1), "B"))
    if state:
        first = b.op("Gather", x, b.constant([0]), axis=0)
        start = b.rng.normal(size=(INPUTS, CELLS)).astype(np.float32)[:, twin]
        inputs += ["", b.op("MatMul", first, b.constant(start, "start"))]
    y = b.op(kind, x, *inputs, hidden_size=size, direction=direction)
    out = b.op("MatMul", b.op("Squeeze", y, b.constant([1])), b.weight(size, 6))
    b.output(b.op("Transpose", out, perm=[1, 0, 2]))
    model = b.build()
    model_io.normalize(model)
    return model


def feeds(count: int, seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {"x": rng.normal(size=(count, STEPS, INPUTS)).astype(np.float32)}


def error(model: ir.Model, options: PruneOptions, folder: Path) -> tuple[float, PassReport]:
    result = model_io.clone(model)
    data = open_dataset(feeds(96, 0), input_specs(model))
    report = PrunePass(options).run(result, context(folder, data))
    model_io.check(result)
    fresh = feeds(16, 1)
    return largest_error(run_model(result, fresh), run_model(model, fresh)), report


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("kind", ["LSTM", "RNN"])
def test_a_layer_does_without_the_twins_of_its_cells(
    kind: str, direction: str, tmp_path: Path
) -> None:
    model = doubled(kind, direction, bias=direction == "forward")
    options = PruneOptions(align=1, keep=("R:0.667",), rounds=1, ridge=1e-6)
    found, report = error(model, options, tmp_path)
    assert any(c.op_type == kind and "refitted" in c.what for c in report.changes)
    assert found < 0.02
    blind, _ = error(model, replace(options, recover=False), tmp_path)
    assert blind > 0.2


def test_initial_cells_are_read_too(tmp_path: Path) -> None:
    model = doubled("LSTM", "forward", state=True)
    options = PruneOptions(align=1, keep=("R:0.667",), rounds=1, ridge=1e-6)
    found, report = error(model, options, tmp_path)
    assert any(c.op_type == "LSTM" and "refitted" in c.what for c in report.changes)
    assert found < 0.02


def test_lengths_of_sequences_are_left_alone_with_the_reason(tmp_path: Path) -> None:
    model = doubled("LSTM", "forward")
    node = next(n for n in model.graph if n.op_type == "LSTM")
    lengths = ir.Value(name="lengths", type=ir.TensorType(ir.DataType.INT32), shape=ir.Shape([1]))
    lengths.const_value = ir.Tensor(np.full(1, STEPS, np.int32), name="lengths")
    model.graph.register_initializer(lengths)
    node.resize_inputs(5)
    node.replace_input_with(4, lengths)
    options = PruneOptions(align=1, keep=("R:0.667",), rounds=1)
    result = model_io.clone(model)
    data = open_dataset({k: v[:1] for k, v in feeds(1, 0).items()}, input_specs(model))
    report = PrunePass(options).run(result, context(tmp_path, data))
    assert any("lengths of their own" in s.reason for s in report.skips)
