"""Running in stages: the same values as in one run, whatever lies in between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.errors import ModelError, PassError
from onnxcompress.graph.constants import set_initializer
from onnxcompress.interface import input_specs
from onnxcompress.passes.prune import PruneOptions, PrunePass
from onnxcompress.passes.prune.stages import plan_stages
from onnxcompress.passes.prune.store import ActivationStore
from onnxcompress.passes.prune.stream import Stream
from tests.builder import Array, ModelBuilder
from tests.fixtures import RUNNABLE, Fixture, fixture
from tests.running import context, run_model


def normalized(case: Fixture) -> ir.Model:
    model = case.build()
    model_io.normalize(model)
    return model


def stream_of(
    model: ir.Model, wanted: list[list[str]], feeds: dict[str, Array], work_dir: Path, limit: int
) -> Stream:
    ctx = context(work_dir)
    data = open_dataset(feeds, input_specs(model))
    stages = plan_stages(model.graph, wanted)
    return Stream(model, stages, data, ctx, 2, ActivationStore(work_dir, limit))


@pytest.mark.parametrize("case", RUNNABLE, ids=str)
def test_stages_give_what_one_run_gives(case: Fixture, tmp_path: Path) -> None:
    """Every tensor of the model, a few at a time, some in memory and the others on disk."""
    model = normalized(case)
    tensors = [
        o
        for node in model.graph
        for o in node.outputs
        if isinstance(o.type, ir.TensorType) and o.shape is not None and o.name
    ]
    names = [o.name or "" for o in tensors]
    wanted = [names[i : i + 3] for i in range(0, len(names), 3)]
    given = case.feeds(model)
    feeds = {n: a if a.ndim else a[None].repeat(2) for n, a in given.items()}
    whole = model_io.clone(model)
    whole.graph.outputs.clear()
    own = {o.name: o for node in whole.graph for o in node.outputs}
    whole.graph.outputs.extend(own[name] for name in names)
    stream = stream_of(model, wanted, feeds, tmp_path, 10_000)
    batches = list(open_dataset(feeds, input_specs(model)).batches(2))
    for number, stage in enumerate(wanted, start=1):
        stream.advance(number, "running")
        for expected_feeds, (_, found) in zip(batches, stream.feeds(stage), strict=True):
            expected = run_model(whole, expected_feeds)
            for name in stage:
                # Fused and unfused operators round differently, in the precision they have.
                bound = 1e-2 if found[name].dtype == np.float16 else 1e-4
                ours, theirs = (v[name].astype(np.float64) for v in (found, expected))
                np.testing.assert_allclose(ours, theirs, rtol=bound, atol=bound)
    stream.close()
    assert not list(tmp_path.glob("activations-*/*"))


def chain() -> ir.Model:
    b = ModelBuilder("chain")
    x = b.input("x", ["batch", 4])
    for number in range(4):
        x = b.op("Relu", b.op("MatMul", x, b.weight(4, 4, name=f"w{number}")))
    b.output(x)
    model = b.build()
    model_io.normalize(model)
    return model


def test_declared_lengths_that_the_data_contradict_are_not_believed(tmp_path: Path) -> None:
    b = ModelBuilder("wrong")
    x = b.input("x", ["batch", "time", 4])
    y = b.op("MatMul", x, b.weight(4, 4))
    b.output(b.op("Relu", b.op("Tanh", y)))
    model = b.build()
    model_io.normalize(model)
    middle = model.graph.node(1).outputs[0]
    middle.shape = ir.Shape(["batch", 9, 4])
    names = [middle.name or "", model.graph.outputs[0].name or ""]
    data: dict[str, Array] = {"x": np.ones((3, 2, 4), np.float32)}
    stream = stream_of(model, [[names[0]], [names[1]]], data, tmp_path, 10_000)
    stream.advance(1, "running")
    stream.advance(2, "running")
    assert [found[names[1]].shape for _, found in stream.feeds([names[1]])] == [
        (2, 2, 4),
        (1, 2, 4),
    ]
    stream.close()


def test_nothing_is_kept_that_no_later_stage_reads() -> None:
    model = chain()
    names = [node.outputs[0].name or "" for node in model.graph]
    stages = plan_stages(model.graph, [[names[1]], [names[3]], [names[7]]])
    assert [stage.outputs for stage in stages] == [(names[1],), (names[3],), (names[7],)]
    assert [stage.dropped for stage in stages] == [(), (names[1],), (names[3],)]
    assert [stage.inputs for stage in stages] == [("x",), (names[1],), (names[3],)]


def test_a_weight_changed_between_stages_counts_from_then_on(tmp_path: Path) -> None:
    model = chain()
    names = [node.outputs[0].name or "" for node in model.graph]
    feeds: dict[str, Array] = {"x": np.ones((3, 4), np.float32)}
    stream = stream_of(model, [[names[1]], [names[3]]], feeds, tmp_path, 1 << 30)
    stream.advance(1, "running")
    first = [found[names[1]] for _, found in stream.feeds([names[1]])]
    set_initializer(model.graph, "w0", np.zeros((4, 4), np.float32))
    set_initializer(model.graph, "w1", np.eye(4, dtype=np.float32))
    stream.advance(2, "running")
    second = [found[names[3]] for _, found in stream.feeds([names[3]])]
    assert np.array_equal(np.concatenate(first), np.concatenate(second))


def test_unknown_values_are_named() -> None:
    with pytest.raises(ModelError, match="no tensor 'nowhere'"):
        plan_stages(chain().graph, [["nowhere"]])


def test_a_full_disk_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = ActivationStore(tmp_path / "file", 0)
    with pytest.raises(PassError, match="cannot be kept") as caught:
        store.put(np.zeros(4))
    assert "prune.samples" in (caught.value.hint or "")


def test_the_store_counts_what_it_holds(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, 100)
    small, large = store.put(np.arange(10.0)), store.put(np.arange(20.0))
    assert store.used_bytes == 80
    assert np.array_equal(store.get(large), np.arange(20.0))
    store.drop(small)
    store.drop(large)
    assert store.used_bytes == 0
    assert not list(tmp_path.glob("activations-*/*"))


def test_batches_that_the_model_refuses_are_halved(tmp_path: Path) -> None:
    b = ModelBuilder("four_rows")
    x = b.op("Reshape", b.input("x", ["batch", 6]), b.constant(np.array([4, 6]), "four"))
    y = b.op("Relu", b.op("Gemm", x, b.weight(6, 16), b.weight(16)))
    b.output(b.op("Gemm", y, b.weight(16, 3), b.weight(3)))
    model = b.build()
    model_io.normalize(model)
    feeds = {"x": np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)}
    data = open_dataset(feeds, input_specs(model))
    ctx = replace(context(tmp_path, data), batch_size=16)
    options = PruneOptions.parse({"params": 0.9, "align": 1}, owner="prune")
    report = PrunePass(options).run(model, ctx)
    assert report.figures["layers_refitted"] == 1
    assert any("Plans were not compared" in note for note in report.notes)


def test_two_runs_give_the_same_model(tmp_path: Path) -> None:
    case = fixture("residual_bn")
    results = []
    for number in range(2):
        model = normalized(case)
        folder = tmp_path / str(number)
        folder.mkdir()
        data = open_dataset(case.feeds(model, batch=24), input_specs(model))
        PrunePass(PruneOptions(macs=0.8, align=1)).run(model, context(folder, data))
        results.append(ir.to_proto(model).SerializeToString())
    assert results[0] == results[1]
