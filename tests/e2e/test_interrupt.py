"""Ctrl-C and SIGTERM in the middle of a run of the real program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fakes

# A background job or nohup leaves signals ignored, and the program respects that.
_PROGRAM = """
import signal, sys, pytest
signal.signal(signal.SIGINT, signal.default_int_handler)
for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):
    signal.signal(getattr(signal, name), signal.SIG_DFL)
from tests import fakes
fakes.install(pytest.MonkeyPatch())
from onnxcompress.cli import main
sys.exit(main())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize(
    ("number", "code"),
    [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)],
    ids=["Ctrl-C", "SIGTERM", "hang-up"],
)
def test_a_signal_leaves_no_partial_file(tmp_path: Path, number: str, code: int) -> None:
    folder, scratch = tmp_path / "models", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    model = fakes.save_classifier(folder / "in.onnx")
    started = tmp_path / "started"
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(model), str(folder / "out.onnx"), "--passes", "sleep"],
        env={**os.environ, "FAKE_SLEEP_FILE": str(started), "TMPDIR": str(scratch)},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        fakes.interrupt_when(started, process.pid, signal.Signals[number])
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert out == ""
    assert fakes.leftovers(folder, "in.onnx") == []
    assert fakes.leftovers(scratch, ".ses") == []  # onnxruntime makes .ses by itself
