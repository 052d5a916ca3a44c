"""Pruning channels inside the branches of an If."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.graph.cost import cost_of
from onnxcompress.interface import input_specs
from onnxcompress.passes.base import PassReport
from onnxcompress.passes.prune import PruneOptions, PrunePass
from tests.builder import ModelBuilder
from tests.running import context, largest_error, run_model

DEAD = 6
"""Channels of each branch that nothing comes of."""
BOTH = [True, False, False, True, True] * 5
"""Which branch each sample takes; not in step with how samples are held out."""


def two_branches() -> ir.Model:
    """Two branches of two layers, 16 channels between them, six of which are zero for every x."""
    b = ModelBuilder("two_branches")
    x, first = b.input("x", [1, 8]), b.input("first", [], np.bool_)
    branches = {}
    for name in ("then_branch", "else_branch"):
        inner = ModelBuilder(name)
        inner.share_names(b)
        made = inner.rng.normal(size=(8, 16)).astype(np.float32)
        made[:, 4 : 4 + DEAD] = 0
        hidden = inner.op("Relu", inner.op("MatMul", x, inner.constant(made, f"{name}_made")))
        read = inner.rng.normal(size=(16, 8)).astype(np.float32)
        out = inner.op("MatMul", hidden, inner.constant(read, f"{name}_read"))
        branches[name] = b.subgraph(name, out, inner)
    b.output(b.op("If", first, **branches), [1, 8])
    model = b.build()
    model_io.normalize(model)
    return model


def pruned(
    model: ir.Model, options: PruneOptions, folder: Path, taken: list[bool]
) -> tuple[ir.Model, PassReport]:
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.normal(size=(len(taken), 1, 8)).astype(np.float32),
        "first": np.array(taken),
    }
    result = model_io.clone(model)
    data = open_dataset(arrays, input_specs(model))
    report = PrunePass(options).run(result, context(folder, data))
    model_io.check(result)
    return result, report


def error(result: ir.Model, model: ir.Model, first: bool) -> float:
    rng = np.random.default_rng(1)
    feeds = {"x": rng.normal(size=(1, 8)).astype(np.float32), "first": np.array(first)}
    return largest_error(run_model(result, feeds), run_model(model, feeds))


@pytest.mark.parametrize("measure", ["params", "bytes"])
def test_weights_of_branches_count_and_dead_channels_go_first(measure: str, tmp_path: Path) -> None:
    model = two_branches()
    options = PruneOptions.parse({measure: 0.7, "align": 1}, owner="prune")
    result, report = pruned(model, options, tmp_path, BOTH)
    before, after = cost_of(model), cost_of(result)
    assert 0.6 <= after.parameters / before.parameters <= 0.7
    assert report.figures["units_removed"] in {10, 11, 12}
    assert error(result, model, True) < 1e-5
    assert error(result, model, False) < 1e-5


def test_a_branch_that_no_sample_runs_is_pruned_by_its_weights_and_not_emptied(
    tmp_path: Path,
) -> None:
    model = two_branches()
    options = PruneOptions(params=0.75, align=1)
    result, report = pruned(model, options, tmp_path, [True] * 16)
    assert error(result, model, True) < 1e-5
    assert error(result, model, False) < 1e-5
    assert any("never run the branch" in note for note in report.notes)
    # As many samples of both branches leave nothing to say.
    _, report = pruned(model, options, tmp_path, BOTH)
    assert not any("never run the branch" in note for note in report.notes)
