"""What passes before have lost, and how passes without a budget keep to what that allows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress import model_io
from onnxcompress.calibration.dataset import Dataset
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.context import PassContext
from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.interface import input_specs
from onnxcompress.passes.prune import PruneOptions, PrunePass, lost
from onnxcompress.passes.prune.lost import BEARABLE, ROOM, Comparison, Lost, class_room, losses_for
from onnxcompress.passes.svd import SvdOptions, SvdPass
from tests.builder import Array, ModelBuilder
from tests.running import context, run_model


def network() -> ir.Model:
    """A residual network whose outputs do not look like classes: there is one."""
    b = ModelBuilder("lost")
    x = b.input("x", ["batch", 3, 6, 6])
    stem = b.op("Relu", b.conv(x, 3, 16))
    y = b.conv(b.op("Relu", b.conv(stem, 16, 32)), 32, 16)
    y = b.op("Relu", b.op("Add", y, stem))
    b.output(b.gemm(b.op("Flatten", b.op("GlobalAveragePool", y)), 16, 1))
    model = b.build()
    model_io.normalize(model)
    return model


def samples(count: int, seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {"x": random.normal(0.3, 1.0, (count, 3, 6, 6)).astype(np.float32)}


def dataset(model: ir.Model, count: int = 64) -> Dataset:
    return open_dataset(samples(count), input_specs(model))


def damaged(model: ir.Model, part: float) -> ir.Model:
    """A copy with noise in its weights, as an earlier pass might leave it."""
    result = model_io.clone(model)
    random = np.random.default_rng(4)
    for name, value in list(result.graph.initializers.items()):
        array = constant_of(value)
        if array is not None and array.ndim > 1:
            noise = random.normal(0.0, part * float(array.std()), array.shape)
            changed = array.astype(np.float64) + noise
            set_initializer(result.graph, name, changed.astype(array.dtype))
    return result


def job(model: ir.Model, tmp_path: Path, *passes: str, data: Dataset | None = None) -> PassContext:
    """A job that knows its original."""
    original = tmp_path / "original.onnx"
    model_io.save(model, original)
    found = context(tmp_path, data or dataset(model))
    return dataclasses.replace(found, original=original, passes=passes)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**16), changed=st.floats(0.01, 0.5), size=st.floats(0.01, 3.0))
def test_the_room_is_where_so_many_classes_change(seed: int, changed: float, size: float) -> None:
    random = np.random.default_rng(seed)
    y = random.normal(size=(300, 6))
    error = size * random.normal(size=y.shape)
    room = class_room(y, y + error, changed, 7.0)
    scale = np.sqrt(room / (np.sum(error**2) / np.sum(y**2)))
    step = 2.0**0.125

    def part(factor: float) -> float:
        return float(np.mean((y + factor * error).argmax(axis=1) != y.argmax(axis=1)))

    assert part(scale * 0.999) <= changed + 1e-9
    if 0 < scale < 15.9:
        assert part(scale * step * 1.001) > changed


def test_without_an_error_the_room_is_not_known() -> None:
    y = np.eye(4)
    assert class_room(y, y, 0.1, 7.0) == 7.0


def test_a_pass_may_add_half_or_what_outputs_stand() -> None:
    assert Lost(0.1, 0.01, 0.02).allowed == pytest.approx(0.05)
    assert Lost(0.001, 0.01, 0.02).allowed == pytest.approx(0.009)


def test_losses_are_those_on_held_out_samples(tmp_path: Path) -> None:
    model = network()
    changed = damaged(model, 0.2)
    data = dataset(model)
    found = Comparison(job(model, tmp_path, data=data), data, model).of(changed)
    held_out = {"x": samples(64)["x"][3::4]}
    outputs = [run_model(m, held_out).values() for m in (model, changed)]
    y, z = (next(iter(arrays)).astype(np.float64) for arrays in outputs)
    assert found.error == pytest.approx(float(np.sum((z - y) ** 2) / np.sum(y**2)), rel=1e-4)
    assert (found.room, found.bearable) == (ROOM, BEARABLE)


def test_nothing_is_lost_of_an_untouched_model_or_an_unknown_original(tmp_path: Path) -> None:
    model = network()
    changed = damaged(model, 0.2)
    known = job(model, tmp_path)
    assert losses_for(known, changed) is not None
    assert losses_for(known, model) is None
    assert losses_for(dataclasses.replace(known, original=None), changed) is None
    assert losses_for(dataclasses.replace(known, calibration=None), changed) is None
    assert losses_for(dataclasses.replace(known, original=tmp_path / "none.onnx"), changed) is None


def test_svd_behind_a_loss_keeps_to_what_that_allows(tmp_path: Path) -> None:
    model = network()
    alone, given = SvdOptions(align=1), SvdOptions(align=1, params=0.75)
    kept = {}
    for name, part in (("untouched", 0.0), ("little", 0.05), ("much", 0.5)):
        changed = damaged(model, part) if part else model
        for options in (alone, given):
            result = model_io.clone(changed)
            ctx = job(model, tmp_path)
            report = SvdPass(options).run(result, ctx)
            kept[name, options is given] = float(report.figures["params_kept_ratio"])
            limited = part > 0 and options is alone
            assert limited == any("the passes before have left" in n for n in report.notes)
            if limited and name == "little":
                losses = Comparison(ctx, dataset(model), model)
                before, after = losses.of(changed), losses.of(result)
                assert after.error <= before.error + 1.3 * before.allowed
    assert kept["untouched", False] <= 0.75
    assert all(kept[name, True] <= 0.75 for name in ("untouched", "little", "much"))
    assert kept["little", False] > kept["much", False] - 1e-9


def test_prune_takes_half_where_its_default_costs_much_and_others_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost, "BEARABLE", 1e-6)
    model = network()
    kept = {}
    for options in (PruneOptions(align=1), PruneOptions(align=1, macs=0.8)):
        for passes in (("prune",), ("prune", "svd")):
            result = model_io.clone(model)
            report = PrunePass(options).run(result, job(model, tmp_path, *passes))
            milder = any("macs=0.9 was kept instead of 0.8" in note for note in report.notes)
            kept[options.macs, passes] = float(report.figures["macs_kept_ratio"]), milder
            model_io.check(result)
    assert kept[0.8, ("prune", "svd")] == kept[0.8, ("prune",)] == kept[None, ("prune",)]
    assert not kept[None, ("prune",)][1]
    ratio, milder = kept[None, ("prune", "svd")]
    assert milder
    assert 0.8 < ratio <= 0.9


def test_before_integers_channels_go_in_whole_steps_where_that_is_bearable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    found = {}
    for bearable in (1.0, 1e-6):
        monkeypatch.setattr(lost, "BEARABLE", bearable)
        for passes in (("prune",), ("prune", "quant")):
            result = model_io.clone(model)
            report = PrunePass().run(result, job(model, tmp_path, *passes))
            noted = any("in the target's whole steps" in note for note in report.notes)
            weights = [n.inputs[1] for n in result.graph if n.op_type == "Conv"]
            widths = [len(array) for w in weights if (array := constant_of(w)) is not None]
            found[bearable, passes] = noted, widths
            assert float(report.figures["macs_kept_ratio"]) <= 0.8
    noted, widths = found[1.0, ("prune", "quant")]
    assert noted
    assert all(width % 16 == 0 for width in widths)
    plain = found[1.0, ("prune",)]
    assert not plain[0]
    assert plain[1] == found[1e-6, ("prune",)][1] == found[1e-6, ("prune", "quant")][1]
    assert any(width % 16 for width in plain[1])
