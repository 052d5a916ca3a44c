"""What whole branches cost once the layers in front of them do their work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.graph.canonical import canonicalize
from onnxcompress.graph.labels import analyse
from onnxcompress.passes.prune import PruneOptions
from onnxcompress.passes.prune.budget import Ledger
from onnxcompress.passes.prune.score import Ranking
from onnxcompress.passes.prune.work import Work
from tests.builder import ModelBuilder
from tests.passes.test_prune import dataset, pruned, samples
from tests.passes.test_prune_emptied import linear_branch, rectified_branch
from tests.running import context, run_model


def ranked(model: ir.Model, options: PruneOptions, folder: Path) -> dict[str, Ranking]:
    """The losses of all groups by the name of what makes them."""
    model = model_io.clone(model)
    data = dataset(model, samples(model, 64))
    canonicalize(model)
    work = Work(model, analyse(model), options, context(folder, data), Ledger.of(model, data))
    return {r.group.sources[0].weight or "": r for r in work.rank({})}


def relative_error(result: ir.Model, model: ir.Model) -> float:
    fresh = samples(model, 64, seed=1)
    name = model.graph.outputs[0].name or ""
    found, wanted = (run_model(m, fresh)[name].astype(np.float64) for m in (result, model))
    return float(np.sum((found - wanted) ** 2) / np.sum(wanted**2))


def test_a_branch_that_the_layer_in_front_can_replace_costs_nothing(tmp_path: Path) -> None:
    found = ranked(linear_branch(), PruneOptions(macs=0.5, align=1), tmp_path)["inner"]
    assert len(found.losses) == 17
    assert found.losses[-1] < 1e-3
    # Who can spare all can spare a part.
    assert (found.losses[:-1] <= found.losses[-1] + 1e-12).all()


def test_the_last_step_costs_what_is_left_after_recovery(tmp_path: Path) -> None:
    model = rectified_branch()
    options = PruneOptions(keep=("second:0",), rounds=1, align=1)
    result, _ = pruned(model, options, tmp_path, dataset(model, samples(model, 64)))
    losses = ranked(model, PruneOptions(macs=0.5, align=1), tmp_path)["second"].losses
    # Layers behind the branch repair some more of it.
    assert losses[-1] / 4 < relative_error(result, model) < losses[-1] * 1.5
    assert (np.diff(losses) >= 0).all()


@pytest.mark.parametrize("activation", ["Sin", "Relu"])
def test_a_branch_without_a_layer_in_front_keeps_its_loss(activation: str, tmp_path: Path) -> None:
    """What a branch is added to is no linear layer here, so nothing can do its work."""
    b = ModelBuilder("no_front")
    h = b.op("Sin", b.gemm(b.input("x", ["batch", 6]), 6, 8))
    inner = b.op(activation, b.op("Gemm", h, b.weight(8, 16, name="inner"), b.weight(16)))
    b.output(b.op("Add", b.gemm(inner, 16, 8), h))
    model = b.build()
    model_io.normalize(model)
    losses = ranked(model, PruneOptions(macs=0.5, align=1), tmp_path)["inner"].losses
    assert len(losses) == 17
    assert losses[-1] > losses[12] > 1e-3


def test_moments_of_few_branches_are_held_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = PruneOptions(macs=0.5, align=1)
    whole = ranked(rectified_branch(), options, tmp_path)
    monkeypatch.setattr("onnxcompress.passes.prune.fronts.MOMENT_BYTES", 1)
    parts = ranked(rectified_branch(), options, tmp_path)
    for name, ranking in whole.items():
        np.testing.assert_allclose(parts[name].losses, ranking.losses, rtol=0.05)
