from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress import model_io
from onnxcompress.graph.cost import cost_of
from onnxcompress.passes.fold import FoldPass
from onnxcompress.passes.simplify import SimplifyOptions, SimplifyPass
from onnxcompress.runtime import open_session
from tests.running import SETTINGS, context, interface, largest_error

# Name, least accuracy, and what the README states: parameters and multiply-accumulates.
MODELS = {
    "digits_resnet": (0.985, 101_754, 1_353_344),
    "digits_dscnn": (0.985, 35_594, 454_400),
    "digits_vit": (0.97, 102_550, 1_675_904),
    "digits_lstm": (0.97, 47_562, 326_272),
}
every_model = pytest.mark.parametrize("name", MODELS)


def accuracy(model: ir.Model, folder: Path, name: str) -> float:
    data = np.load(folder / f"{name}.eval.npz")
    logits = open_session(model, SETTINGS).run({"image": data["image"]})["logits"]
    return float((logits.argmax(1) == data["labels"]).mean())


@every_model
def test_accuracy_and_cost_are_what_the_readme_says(models_dir: Path, name: str) -> None:
    least, parameters, macs = MODELS[name]
    model = model_io.load(models_dir / f"{name}.onnx")
    measured = accuracy(model, models_dir, name)
    assert measured >= least
    cost = cost_of(model)
    assert (cost.parameters, cost.macs, cost.unknown) == (parameters, macs, ())
    row = next(r for r in (models_dir / "README.md").read_text().splitlines() if f"`{name}`" in r)
    assert f"| {parameters:,} | {macs:,} |" in row
    assert f"| {100 * measured:.1f} % |" in row


@every_model
def test_files_are_small_valid_and_free_of_paths(models_dir: Path, name: str) -> None:
    path = models_dir / f"{name}.onnx"
    assert path.stat().st_size < 500_000
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert not any(node.doc_string or node.metadata_props for node in proto.graph.node)


@every_model
def test_the_batch_axis_is_dynamic(models_dir: Path, name: str) -> None:
    session = open_session(models_dir / f"{name}.onnx", SETTINGS)
    images = np.load(models_dir / f"{name}.eval.npz")["image"][:5]
    together = session.run({"image": images})["logits"]
    one_by_one = [session.run({"image": images[i : i + 1]})["logits"] for i in range(5)]
    assert largest_error({"logits": np.concatenate(one_by_one)}, {"logits": together}) < 1e-5


@every_model
def test_calibration_and_evaluation_images_are_disjoint(models_dir: Path, name: str) -> None:
    calib, evaluation = (np.load(models_dir / f"{name}.{r}.npz") for r in ("calib", "eval"))
    assert calib.files == ["image"]
    assert sorted(evaluation.files) == ["image", "labels"]
    assert calib["image"].dtype == evaluation["image"].dtype == np.float32
    assert len(calib["image"]) <= 256
    assert len(evaluation["image"]) == len(evaluation["labels"]) >= 450
    assert sorted(set(evaluation["labels"].tolist())) == list(range(10))
    seen = {image.tobytes() for image in calib["image"]}
    assert len(seen) == len(calib["image"])
    assert not seen & {image.tobytes() for image in evaluation["image"]}


def test_the_residual_network_has_normalizations_to_fold(models_dir: Path, tmp_path: Path) -> None:
    model = model_io.load(models_dir / "digits_resnet.onnx")
    model_io.normalize(model)
    SimplifyPass(SimplifyOptions(onnxsim=False)).run(model, context(tmp_path))
    report = FoldPass().run(model, context(tmp_path))
    assert sum(c.op_type == "BatchNormalization" for c in report.changes) == 13
    assert report.skips == ()


@every_model
def test_preparation_keeps_outputs_and_interface(
    models_dir: Path, tmp_path: Path, name: str
) -> None:
    model = model_io.load(models_dir / f"{name}.onnx")
    model_io.normalize(model)
    original = model.clone()
    SimplifyPass(SimplifyOptions(onnxsim=False)).run(model, context(tmp_path))
    FoldPass().run(model, context(tmp_path))
    assert interface(model) == interface(original)
    assert not {"Shape", "Identity", "BatchNormalization"} & {n.op_type for n in model.graph}
    feeds = {"image": np.load(models_dir / f"{name}.eval.npz")["image"][:64]}
    found, expected = (open_session(m, SETTINGS).run(feeds) for m in (model, original))
    assert largest_error(found, expected) < 1e-5
