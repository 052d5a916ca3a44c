"""The real passes in the whole pipeline, on small trained models."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcompress.cli import main
from onnxcompress.pipeline import compress
from onnxcompress.verification.gates import Gates


def test_prune_and_quantize_a_trained_model(models_dir: Path, tmp_path: Path) -> None:
    result = compress(
        models_dir / "digits_lstm.onnx",
        tmp_path / "out.onnx",
        passes=["quant", "prune"],
        options={"quant": {"search_seconds": 0, "objective": "size"}},
        calib_samples=64,
        eval_samples=200,
        gates=Gates(min_agreement=0.9, max_drop=0.05),
        measure=False,
    )
    assert result.written
    assert [run.name for run in result.passes] == ["simplify", "fold", "prune", "quant"]
    checked = result.verification
    assert checked is not None
    assert checked.result is not None
    assert checked.result.raw_bytes < 0.8 * checked.original.raw_bytes
    assert checked.result.macs < 0.85 * checked.original.macs
    onnx.checker.check_model(str(result.output_path), full_check=True)


def test_names_of_what_passes_add_are_short_unless_kept(models_dir: Path, tmp_path: Path) -> None:
    model = models_dir / "digits_dscnn.onnx"
    data = np.random.default_rng(0).normal(size=(4, 1, 8, 8)).astype(np.float32)
    nodes: dict[str, set[str]] = {}
    weights: dict[str, set[str]] = {}
    sizes: dict[str, int] = {}
    for mode in ("short", "keep", "all"):
        result = compress(
            model,
            tmp_path / f"{mode}.onnx",
            passes=["share"],
            options={"share": {"assign": "nearest"}},
            eval=data,
            names=mode,
            measure=False,
        )
        graph = onnx.load(result.output_path).graph
        assert "Gather" in {node.op_type for node in graph.node}
        nodes[mode] = {node.name for node in graph.node}
        weights[mode] = {tensor.name for tensor in graph.initializer}
        sizes[mode] = result.output_path.stat().st_size
    ours = {name for name in nodes["keep"] if "/share_" in name}
    assert ours
    assert nodes["short"] == nodes["keep"] - ours | {""}
    assert nodes["all"] == {""}
    assert max(map(len, weights["all"])) == 1
    assert {n for n in weights["keep"] if "/share_" not in n} <= weights["short"]
    assert sizes["all"] < sizes["short"] < sizes["keep"]


def test_a_dry_run_of_the_real_passes_writes_nothing(
    models_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copy(models_dir / "digits_dscnn.onnx", tmp_path))
    assert (
        main([str(model), str(tmp_path / "out.onnx"), "--passes", "quant,prune", "--dry-run"]) == 0
    )
    assert "would make" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [model.name]


@pytest.mark.parametrize("name", ["cifar_resnet20", "kws_dscnn", "silero_vad", "ppocr_cls"])
def test_preparing_real_models_changes_no_output(zoo: Path, name: str, tmp_path: Path) -> None:
    result = compress(
        zoo / f"{name}.onnx",
        tmp_path / "out.onnx",
        passes=["simplify", "fold"],
        eval_samples=16,
        gates=Gates(min_sqnr_db=80),
        measure=False,
    )
    assert result.passed
