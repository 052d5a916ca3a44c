"""Placements that were found before."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.cache import VARIABLE
from onnxcompress.calibration.synthetic import synthetic_dataset
from onnxcompress.passes.base import PassReport
from onnxcompress.passes.quant import QuantOptions, QuantPass, by_clock, memory
from onnxcompress.passes.quant.search import Candidate, Found
from onnxcompress.targets import detect_target
from tests.fixtures import fixture
from tests.running import context


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and a clock that finds everything equally fast."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(by_clock, "run_times", lambda *_, **__: [2.0, 1.0])
    return tmp_path / "cache"


def _run(tmp_path: Path, **values: str) -> PassReport:
    model = fixture("residual_bn").build()
    model_io.normalize(model)
    data = synthetic_dataset(model, samples=4, seed=0)
    ctx = dataclasses.replace(context(tmp_path, data), target=detect_target())
    return QuantPass(QuantOptions.parse(values, owner="quant")).run(model, ctx)


def test_the_second_run_takes_what_the_first_found_and_says_so(
    folder: Path, tmp_path: Path
) -> None:
    first, second = _run(tmp_path), _run(tmp_path)
    assert first.figures["placements_timed"] != 0
    assert second.figures["placements_timed"] == 0
    assert first.figures["placement"] == second.figures["placement"]
    assert not any("found before" in note for note in first.notes)
    assert any("found before" in note for note in second.notes)
    assert len(list(folder.rglob("*.json"))) == 1


def test_other_options_search_again(folder: Path, tmp_path: Path) -> None:
    _run(tmp_path)
    assert _run(tmp_path, cache="false").figures["placements_timed"] != 0
    assert _run(tmp_path, search_seconds="9").figures["placements_timed"] != 0
    assert len(list(folder.rglob("*.json"))) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"placement": None},
        {"placement": {"prefix": 1}},
        {"timed": "many"},
        {"prefix": -1},
        {"prefix": True},
        {"joins": 1},
        {"prefix": "1"},
    ],
)
def test_an_entry_that_makes_no_sense_is_not_used(
    folder: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    _run(tmp_path)
    (path,) = folder.rglob("*.json")
    entry = json.loads(path.read_text())
    for name, value in change.items():
        (entry if name in entry else entry["placement"])[name] = value
    path.write_text(json.dumps(entry))
    assert memory.recall(path.stem) is None
    assert _run(tmp_path).figures["placements_timed"] != 0
    assert memory.recall(path.stem) is not None


def test_a_placement_comes_back_as_it_was(folder: Path) -> None:
    found = Found(Candidate(prefix=2, depthwise=64, joins=False, pools=True), 7, 1.25)
    assert memory.remember("k", found)
    assert memory.recall("k") == found
    assert memory.recall("other") is None
    assert folder.exists()


def _key(model: ir.Model, tmp_path: Path) -> str:
    data = synthetic_dataset(model, samples=1, seed=0)
    return memory.placement_key(
        model, frozenset({"a"}), data.first(), context(tmp_path).target, QuantOptions()
    )


def test_the_key_sees_the_graph_but_not_the_values_of_weights(tmp_path: Path) -> None:
    model = fixture("residual_bn").build()
    key = _key(model, tmp_path)
    weight = max(model.graph.initializers.values(), key=lambda v: v.const_value.nbytes)  # type: ignore[union-attr]
    array = weight.const_value.numpy()  # type: ignore[union-attr]
    weight.const_value = ir.tensor(array + 1, name=weight.name)
    assert _key(model, tmp_path) == key
    for node in model.graph:
        if node.op_type == "Relu":
            node.op_type = "Sigmoid"
            break
    assert _key(model, tmp_path) != key
