"""The public API as a user imports it, with the real passes that need no data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxcompress
from tests import fakes


def test_every_public_name_is_there() -> None:
    for name in onnxcompress.__all__:
        assert getattr(onnxcompress, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = onnxcompress.nonsense


def test_importing_the_package_is_cheap() -> None:
    """A bare import, and ``--help``, load neither onnxruntime nor numpy."""
    code = (
        "import sys, onnxcompress, onnxcompress.cli; "
        "sys.exit(any(m in sys.modules for m in ('onnxruntime', 'numpy', 'onnx', 'torch', 'rich')))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0


@pytest.mark.parametrize("first", ["passes.base", "pipeline", "context", "cli", "recipe", "api"])
def test_modules_import_in_any_order(first: str) -> None:
    code = f"import onnxcompress.{first}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_compress_verify_inspect_load_and_save(tmp_path: Path) -> None:
    model = fakes.save_classifier(tmp_path / "in.onnx")
    data = fakes.samples(16)
    result = onnxcompress.compress(
        model, tmp_path / "out.onnx", passes=["fold"], eval=data, measure=False
    )
    assert result.passed
    checked = onnxcompress.verify(model, result.output_path, data, measure=False)
    assert checked.comparison.outputs[0].cosine == pytest.approx(1.0)
    assert onnxcompress.inspect(result.output_path).parameters == 180
    onnxcompress.save(onnxcompress.load(model), tmp_path / "again.onnx")
    onnx.checker.check_model(str(tmp_path / "again.onnx"))
    again = onnxcompress.verify(model, tmp_path / "again.onnx", data, measure=False)
    assert again.comparison.outputs[0].max_abs_error == 0.0


def test_the_job_is_the_same_for_names_of_any_kind(tmp_path: Path) -> None:
    """Spaces and letters beyond ASCII in file names."""
    folder = tmp_path / "größe und maß"
    folder.mkdir()
    model = fakes.save_classifier(folder / "modèle 1.onnx")
    np.savez(folder / "modèle 1.eval.npz", x=fakes.samples(5))
    result = onnxcompress.compress(model, folder / "klein.onnx", passes=["fold"], measure=False)
    assert result.written
    assert result.verification is not None
    assert not result.verification.synthetic
