"""The pruning pass: budgets, recovery, options and every fixture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.calibration.dataset import Dataset
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.errors import PassError, UsageError
from onnxcompress.graph.cost import cost_of
from onnxcompress.interface import input_specs
from onnxcompress.passes.base import PassReport
from onnxcompress.passes.prune import Importance, PruneOptions, PrunePass
from onnxcompress.passes.prune import samples as judged
from onnxcompress.passes.prune.options import Budget, Measure
from tests.builder import Array, ModelBuilder
from tests.fixtures import RUNNABLE, Fixture, fixture
from tests.running import context, interface, largest_error, run_model

QUICK = (
    "residual_bn",
    "depthwise_separable",
    "inception_concat",
    "squeeze_excite",
    "grouped_shuffle",
    "conv_1d_3d",
    "pad_slice_shortcut",
    "mlp_matmul",
    "mini_transformer",
    "tied_weights",
    "lstm",
    "half_precision",
    "two_outputs",
)
"""Fixtures for the test with data and recovery: one of each kind, to stay quick."""


BLIND = PruneOptions(align=1, importance=Importance.L2, recover=False)
"""Weights alone decide, nothing is refitted."""


def normalized(model: ir.Model) -> ir.Model:
    model_io.normalize(model)
    return model


def samples(model: ir.Model, count: int, seed: int = 0) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {
        s.name: rng.normal(size=[count, *(int(d) for d in (s.shape or ())[1:])]).astype(s.dtype)
        for s in input_specs(model)
    }


def dataset(model: ir.Model, feeds: dict[str, Array]) -> Dataset:
    return open_dataset(feeds, input_specs(model))


def redundant_network() -> ir.Model:
    """A residual network in which 8 of 16 inner channels are linear combinations of the others.

    The inner layers have no activation and the first one no bias, so the loss can be made up
    exactly.
    """
    b = ModelBuilder("redundant")
    x = b.input("x", ["batch", 4, 6, 6])
    stem = b.op("Relu", b.conv(x, 4, 8))
    base = b.rng.normal(size=(8, 8, 3, 3))
    mixing = b.rng.normal(size=(8, 8))
    weight = np.concatenate([base, np.einsum("ij,jckl->ickl", mixing, base)])[b.rng.permutation(16)]
    inner = b.op("Conv", stem, b.constant(weight.astype(np.float32) / 8, "inner"), pads=[1] * 4)
    y = b.op("Add", b.conv(inner, 16, 8, bias=False), stem)
    b.output(b.gemm(b.op("Flatten", b.op("GlobalAveragePool", b.op("Relu", y))), 8, 5))
    return normalized(b.build())


def pruned(
    model: ir.Model, options: PruneOptions, work_dir: Path, data: Dataset | None = None
) -> tuple[ir.Model, PassReport]:
    """A pruned copy, checked and with the interface of the original."""
    result = model_io.clone(model)
    report = PrunePass(options).run(result, context(work_dir, data))
    model_io.check(result)
    assert interface(result) == interface(model)
    return result, report


def test_redundant_channels_go_and_the_outputs_stay(tmp_path: Path) -> None:
    model = redundant_network()
    data = dataset(model, samples(model, 64))
    options = PruneOptions(macs=0.6, align=1, include=("inner",), min_kept=0.5)
    result, report = pruned(model, options, tmp_path, data)
    assert report.figures["units_removed"] == 8
    assert float(report.figures["macs_kept_ratio"]) <= 0.6
    fresh = samples(model, 16, seed=1)
    assert largest_error(run_model(result, fresh), run_model(model, fresh)) < 1e-3

    blind = replace(BLIND, macs=0.6, include=("inner",), min_kept=0.5)
    without, _ = pruned(model, blind, tmp_path, data)
    assert largest_error(run_model(without, fresh), run_model(model, fresh)) > 0.02


def test_recovery_lowers_the_error_of_every_criterion(tmp_path: Path) -> None:
    model = normalized(fixture("pad_slice_shortcut").build())
    data, fresh = dataset(model, samples(model, 64)), samples(model, 32, seed=1)
    expected = {n: v.astype(np.float64) for n, v in run_model(model, fresh).items()}

    def error(importance: Importance, recover: bool) -> float:
        options = PruneOptions(macs=0.7, align=1, importance=importance, recover=recover)
        found = run_model(pruned(model, options, tmp_path, data)[0], fresh)
        return sum(float(np.sum((found[n].astype(np.float64) - expected[n]) ** 2)) for n in found)

    for importance in (Importance.OBS, Importance.ACTIVATION, Importance.L1, Importance.RANDOM):
        assert error(importance, True) < error(importance, False), importance


def test_a_branch_makes_up_for_what_its_shortcut_lost(tmp_path: Path) -> None:
    """The right layer sees all of x, so it can imitate what the left one lost exactly."""
    b = ModelBuilder("shortcut")
    x = b.input("x", ["batch", 6])
    hidden = b.op("MatMul", x, b.weight(6, 8, name="narrow"))
    left = b.op("Gemm", hidden, b.weight(8, 6), b.weight(6))
    right = b.op("Gemm", x, b.weight(6, 6), b.weight(6))
    b.output(b.op("Tanh", b.op("Add", left, right)))
    model = normalized(b.build())
    feeds = samples(model, 64)
    options = PruneOptions(macs=0.6, align=1, include=("narrow",), min_kept=0.0)
    result, _ = pruned(model, options, tmp_path, dataset(model, feeds))
    blind = replace(options, recover=False)
    without, _ = pruned(model, blind, tmp_path, dataset(model, feeds))
    fresh = samples(model, 16, seed=1)
    expected = run_model(model, fresh)
    assert largest_error(run_model(without, fresh), expected) > 0.1
    assert largest_error(run_model(result, fresh), expected) < 1e-3


def test_refitting_everything_reaches_layers_that_lost_nothing(tmp_path: Path) -> None:
    b = ModelBuilder("three_layers")
    y = b.op("Relu", b.conv(b.input("x", ["batch", 3, 8, 8]), 3, 8))
    b.output(b.conv(b.op("Relu", b.conv(y, 8, 8)), 8, 4))
    model = normalized(b.build())
    first, second, third = (n.name or "" for n in model.graph if n.op_type == "Conv")
    data = dataset(model, samples(model, 48))
    options = PruneOptions(macs=0.7, align=1, include=(first,))
    refitted = [
        {c.node for c in pruned(model, o, tmp_path, data)[1].changes if "refitted" in c.what}
        for o in (replace(options, recover_all=False), options)
    ]
    assert refitted == [{second}, {second, third}]


@pytest.mark.parametrize("measure", ["macs", "params", "bytes"])
def test_every_budget_is_met_and_not_by_far(measure: str, tmp_path: Path) -> None:
    model = normalized(fixture("mini_transformer").build())
    values = {measure: 0.75, "align": 1, "importance": "l2", "recover": False}
    options = PruneOptions.parse(values, owner="prune")
    result, report = pruned(model, options, tmp_path)
    before, after = cost_of(model), cost_of(result)
    ratio = {
        "macs": after.macs / before.macs,
        "params": after.parameters / before.parameters,
        "bytes": after.weight_bytes / before.weight_bytes,
    }[measure]
    assert 0.65 <= ratio <= 0.75
    assert report.figures["macs_kept_ratio"] == pytest.approx(after.macs / before.macs)


@pytest.mark.parametrize("case", RUNNABLE, ids=str)
def test_every_fixture_survives_without_data(case: Fixture, tmp_path: Path) -> None:
    model = normalized(case.build())
    result, report = pruned(model, PruneOptions(params=0.85, align=1), tmp_path)
    found = run_model(result, case.feeds(model))
    assert all(np.isfinite(v).all() for v in found.values() if v.dtype.kind == "f")
    assert any("No calibration data" in n for n in report.notes)
    if report.changes:
        assert float(report.figures["params_kept_ratio"]) < 0.95
    else:
        assert any("Nothing can be pruned" in n for n in report.notes)


@pytest.mark.parametrize("name", QUICK)
def test_fixtures_of_each_kind_survive_with_recovery(name: str, tmp_path: Path) -> None:
    case = fixture(name)
    model = normalized(case.build())
    data = dataset(model, case.feeds(model, batch=12))
    result, report = pruned(model, PruneOptions(macs=0.85, align=1), tmp_path, data)
    assert float(report.figures["macs_kept_ratio"]) <= 0.85
    found = run_model(result, case.feeds(model, seed=1))
    assert all(np.isfinite(v).all() for v in found.values() if v.dtype.kind == "f")


def test_a_missing_bias_is_added_only_where_it_is_used(tmp_path: Path) -> None:
    model = redundant_network()
    data = dataset(model, samples(model, 32))
    result, _ = pruned(model, PruneOptions(macs=0.6, align=1, include=("inner",)), tmp_path, data)
    added = [n for n in result.graph.initializers if n.endswith("/prune_bias")]
    convolutions = [n for n in result.graph if n.op_type == "Conv"]
    assert len(added) == sum(len(n.inputs) > 2 for n in convolutions) - 1  # the stem has its own
    assert len(added) == 1


def test_names_choose_the_groups_and_unknown_names_are_refused(tmp_path: Path) -> None:
    model = normalized(fixture("conv_chain").build())
    first, second = (n.name or "" for n in model.graph if n.op_type == "Conv")
    _, report = pruned(model, replace(BLIND, macs=0.9, include=(first,)), tmp_path)
    assert {c.node for c in report.changes} == {first}
    _, report = pruned(model, replace(BLIND, macs=0.9, exclude=(first,)), tmp_path)
    assert {c.node for c in report.changes} == {second}
    assert any(s.node == first and "prune.exclude" in s.reason for s in report.skips)
    with pytest.raises(UsageError, match="'nowhere\\*' of the pass 'prune' matches nothing"):
        pruned(model, replace(BLIND, include=("nowhere*",)), tmp_path)


def test_a_budget_out_of_reach_is_an_error_that_names_what_is_possible(tmp_path: Path) -> None:
    model = normalized(fixture("conv_chain").build())
    with pytest.raises(PassError, match=r"macs=0\.05 cannot be reached") as caught:
        pruned(model, PruneOptions(macs=0.05), tmp_path)
    hint = caught.value.hint or ""
    reachable = float(hint.split("macs=")[1].split()[0])
    _, report = pruned(model, PruneOptions(macs=reachable), tmp_path)
    assert float(report.figures["macs_kept_ratio"]) <= reachable


def test_the_default_budget_out_of_reach_prunes_nothing_and_says_so(tmp_path: Path) -> None:
    model = normalized(fixture("conv_chain").build())
    result, report = pruned(model, PruneOptions(min_kept=0.9, align=1), tmp_path)
    assert any(note.startswith("Nothing was pruned: macs=0.8") for note in report.notes)
    assert report.figures["units_removed"] == 0
    assert not report.changes
    assert sum(n.op_type == "Conv" for n in result.graph) > 1
    with pytest.raises(PassError, match=r"macs=0\.8 cannot be reached"):
        pruned(model, PruneOptions(macs=0.8, min_kept=0.9, align=1), tmp_path)


def test_losses_are_measured_on_fewer_samples_where_runs_are_much_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = redundant_network()
    data = dataset(model, samples(model, 64))
    options = PruneOptions(macs=0.8, align=1, plans=1)
    _, report = pruned(model, options, tmp_path, data)
    assert not any("Losses of groups" in note for note in report.notes)
    monkeypatch.setattr(judged, "_WORK", 1.0)
    _, report = pruned(model, options, tmp_path, data)
    wanted = "Losses of groups were measured on 4 samples instead of 16"
    assert sum(note.startswith(wanted) for note in report.notes) == 1
    assert float(report.figures["macs_kept_ratio"]) <= 0.8


def test_limits_name_how_much_stays_where(tmp_path: Path) -> None:
    model = normalized(fixture("conv_chain").build())
    first, second = (n.name or "" for n in model.graph if n.op_type == "Conv")
    options = replace(BLIND, params=0.5, limits=("*:0.25", f"{first}:1"))
    _, report = pruned(model, options, tmp_path)
    assert {c.node for c in report.changes} == {second}
    with pytest.raises(UsageError, match="'nowhere' of the pass 'prune' matches nothing"):
        pruned(model, replace(options, limits=("nowhere:0.5",)), tmp_path)
    for wrong in ("conv", "conv:", "conv:2", ":0.5", "conv:nan"):
        with pytest.raises(UsageError, match="is not PATTERN:FRACTION"):
            PruneOptions.parse({"limits": wrong}, owner="prune")


def three_widths() -> ir.Model:
    """Convolutions that make 20, 12, 10 and 4 channels, one behind the other."""
    b = ModelBuilder("three_widths")
    y = b.op("Relu", b.conv(b.input("x", ["batch", 3, 6, 6]), 3, 20))
    y = b.op("Relu", b.conv(b.op("Relu", b.conv(y, 20, 12)), 12, 10))
    b.output(b.conv(y, 10, 4))
    return normalized(b.build())


def test_keep_names_what_stays_exactly(tmp_path: Path) -> None:
    model = three_widths()
    first, second, third, _ = (n.name or "" for n in model.graph if n.op_type == "Conv")
    data = dataset(model, samples(model, 24))

    def widths(options: PruneOptions) -> tuple[list[object], PassReport]:
        result, report = pruned(model, options, tmp_path, data)
        shapes = [n.outputs[0].shape for n in result.graph if n.op_type == "Conv"]
        return [s[1] for s in shapes if s is not None], report

    options = PruneOptions(align=1, keep=(f"{first}:0.6", f"{second}:0.5"))
    assert options.budget is None
    assert options.steps == 3
    found, report = widths(options)
    assert found == [12, 6, 10, 4]
    reasons = {s.node: s.reason for s in report.skips}
    assert reasons[third] == ("prune.keep and prune.total do not name it, and there is no budget")
    # Two patterns that fit: the larger counts. A budget treats the others.
    found, _ = widths(PruneOptions(align=1, macs=0.4, keep=("*:0", f"{first}:0.61", f"{third}:1")))
    assert found == [12, 1, 10, 4]
    found, _ = widths(PruneOptions(align=1, macs=0.45, keep=(f"{first}:0.6",)))
    assert found[0] == 12
    assert min(found[1] / 12, found[2] / 10) < 1  # type: ignore[operator]
    with pytest.raises(UsageError, match="'nowhere' of the pass 'prune' matches nothing"):
        widths(PruneOptions(keep=("nowhere:0.5",)))
    with pytest.raises(UsageError, match=r"prune\.keep: 'conv' is not PATTERN:FRACTION"):
        PruneOptions.parse({"keep": "conv"}, owner="prune")


def test_what_stands_in_padding_changes_nothing(tmp_path: Path) -> None:
    """Attention over tokens whose mask the model obeys, and a wide layer behind it."""
    b = ModelBuilder("padded")
    ids, mask = (b.input(n, ["batch", "length"], np.int64) for n in ("ids", "mask"))
    x = b.op("Gather", b.weight(20, 8), ids)
    keep = b.op("Unsqueeze", b.op("Cast", mask, to=1), b.constant([1]))
    off = b.op("Mul", b.op("Sub", b.constant(1.0), keep), b.constant(-1e9))
    scores = b.op("Add", b.op("MatMul", x, b.op("Transpose", x, perm=[0, 2, 1])), off)
    y = b.op("MatMul", b.op("Softmax", scores, axis=-1), x)
    b.output(b.linear(b.op("Tanh", b.linear(y, 8, 24)), 24, 4))
    model = normalized(b.build())
    rng = np.random.default_rng(0)
    used = (np.arange(12) < rng.integers(2, 9, (48, 1))).astype(np.int64)
    tokens = rng.integers(0, 20, used.shape)
    options = PruneOptions(params=0.7, align=1, rounds=1)
    found = []
    for filler in (0, 7):
        filled = np.where(used == 1, tokens, filler)
        data = dataset(model, {"ids": filled, "mask": used})
        result, report = pruned(model, options, tmp_path, data)
        assert any("padding" in note for note in report.notes)
        found.append(run_model(result, {"ids": tokens[:4], "mask": used[:4]}))
    assert largest_error(found[0], found[1]) == 0


def test_an_empty_budget_is_refused_and_none_is_the_default() -> None:
    with pytest.raises(UsageError, match=r"option prune\.macs has no value"):
        PruneOptions.parse({"macs": ""}, owner="prune")
    assert PruneOptions.parse({"macs": "none"}, owner="prune").budget == Budget(Measure.MACS, 0.8)


@pytest.mark.parametrize("importance", ["obs", "activation", "l2"])
def test_rounds_never_give_back_what_is_gone_and_meet_the_budget(
    importance: str, tmp_path: Path
) -> None:
    model = normalized(fixture("residual_bn").build())
    data = dataset(model, samples(model, 48))
    values = {"macs": 0.6, "align": 1, "rounds": 3, "importance": importance}
    options = PruneOptions.parse(values, owner="prune")
    result, report = pruned(model, options, tmp_path, data)
    assert 0.45 <= cost_of(result).macs / cost_of(model).macs <= 0.6
    assert any("refitted" in c.what for c in report.changes)


def test_total_spreads_one_count_over_all_that_match(tmp_path: Path) -> None:
    model = three_widths()
    first, second, third, _ = (n.name or "" for n in model.graph if n.op_type == "Conv")
    data = dataset(model, samples(model, 24))

    def widths(**given: object) -> list[int]:
        options = PruneOptions.parse({"align": 1, **given}, owner="prune")
        result, _ = pruned(model, options, tmp_path, data)
        shapes = [n.outputs[0].shape for n in result.graph if n.op_type == "Conv"]
        return [n for s in shapes if s is not None and isinstance(n := s[1], int)]

    found = widths(total=f"{first}:0.5,{second}:1,{third}:0.5")
    assert found == [10, 12, 5, 4]
    found = widths(total="*:0.5", plans=1)
    assert sum(found[:3]) == 21  # of 42
    assert found[:3] != [10, 6, 5], "spread by loss, not equally"
    # What keep names is not counted; a budget treats what neither names.
    found = widths(total="*:0.5", keep=f"{first}:1")
    assert found[0] == 20
    assert sum(found[1:3]) == 11  # of 22
    found = widths(total=f"{first}:0.5", macs=0.5)
    assert found[0] == 10
    with pytest.raises(PassError, match=r"total=\*:0\.01 cannot be reached"):
        widths(total="*:0.01")
    with pytest.raises(UsageError, match="'nowhere' of the pass 'prune' matches nothing"):
        widths(total="nowhere:0.5")


def test_a_budget_takes_one_round_and_fixed_shares_as_many_as_they_need() -> None:
    assert [PruneOptions(macs=k).steps for k in (0.95, 0.5, 0.2)] == [1, 1, 1]
    assert PruneOptions(params=0.2, rounds=3).steps == 3
    assert [PruneOptions(keep=(f"*:{k}",)).steps for k in (0.9, 0.5)] == [1, 3]
    assert PruneOptions(total=("*:0.2",)).steps == 1


def test_several_rounds_repair_what_one_round_cannot(tmp_path: Path) -> None:
    model = normalized(fixture("pad_slice_shortcut").build())
    data, fresh = dataset(model, samples(model, 64)), samples(model, 32, seed=1)
    expected = {n: v.astype(np.float64) for n, v in run_model(model, fresh).items()}

    def error(options: PruneOptions) -> float:
        found = run_model(pruned(model, options, tmp_path, data)[0], fresh)
        return sum(
            float(np.sum((v.astype(np.float64) - expected[n]) ** 2)) for n, v in found.items()
        )

    options = PruneOptions(macs=0.6, align=1, importance=Importance.L2)
    assert error(replace(options, rounds=3)) < 1.1 * error(options)


def test_options_that_contradict_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes one budget, not macs and params"):
        PrunePass(PruneOptions(macs=0.5, params=0.5))
    with pytest.raises(UsageError, match="at least"):
        PruneOptions.parse({"macs": "0"}, owner="prune")
    model = normalized(fixture("conv_chain").build())
    with pytest.raises(UsageError, match="importance=obs needs calibration data"):
        pruned(model, PruneOptions(importance=Importance.OBS), tmp_path)


def test_alignment_is_kept_when_asked_for(tmp_path: Path) -> None:
    b = ModelBuilder("aligned")
    x = b.input("x", ["batch", 3, 6, 6])
    y = b.op("Relu", b.conv(x, 3, 40))
    b.output(b.conv(b.op("Relu", b.conv(y, 40, 24)), 24, 5))
    model = normalized(b.build())
    result, _ = pruned(model, PruneOptions(macs=0.6, align=8), tmp_path)
    widths = [n.outputs[0].shape for n in result.graph if n.op_type == "Conv"]
    assert [s is not None and s[1] in {8, 16, 24, 32, 40} for s in widths[:2]] == [True, True]


def test_random_importance_follows_the_seed(tmp_path: Path) -> None:
    model = normalized(fixture("conv_chain").build())
    options = PruneOptions(macs=0.8, align=1, importance=Importance.RANDOM)
    feeds = fixture("conv_chain").feeds(model)
    first, second = (run_model(pruned(model, options, tmp_path)[0], feeds) for _ in range(2))
    assert largest_error(first, second) == 0


def test_the_plan_names_the_groups_and_changes_nothing(tmp_path: Path) -> None:
    model = normalized(fixture("residual_bn").build())
    before = ir.to_proto(model).SerializeToString()
    report = PrunePass().plan(model, context(tmp_path))
    assert ir.to_proto(model).SerializeToString() == before
    assert report.changes
    assert len(report.changes) == report.figures["groups"]
    assert all("may go" in c.what for c in report.changes)
    assert report.skips


def test_few_samples_do_no_harm(tmp_path: Path) -> None:
    """With four samples nothing is held out; the ridge alone must keep the fit sane."""
    model = normalized(fixture("mlp_gemm").build())
    fresh = samples(model, 64, seed=1)
    expected = run_model(model, fresh)
    options = PruneOptions(macs=0.75, align=1)
    fitted, report = pruned(model, options, tmp_path, dataset(model, samples(model, 4)))
    blind, _ = pruned(model, options, tmp_path)
    assert any("fewer than 10 rows" in n for n in report.notes)
    assert largest_error(run_model(fitted, fresh), expected) <= 1.2 * largest_error(
        run_model(blind, fresh), expected
    )
