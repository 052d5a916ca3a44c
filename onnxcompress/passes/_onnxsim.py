"""onnxsim in a process of its own: it is C++ that may crash, hang or print."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.errors import ModelError

_SCRIPT = """
import sys
import onnx, onnxsim
source, target, threshold = sys.argv[1:]
model, ok = onnxsim.simplify(onnx.load(source), skip_fuse_bn=True, tensor_size_threshold=threshold)
onnx.save(model, target)
sys.exit(0 if ok else 3)
"""

# The largest model of the benchmark zoo (90 MB) takes 9 s, of which 3 s are the import.
_BASE_SECONDS = 60.0
_SECONDS_PER_MEGABYTE = 0.5


class OnnxsimError(Exception):
    """onnxsim gave no model; the message says why."""


def simplify(
    model: ir.Model, *, work_dir: Path, max_folded_bytes: int, size_bytes: int
) -> ir.Model:
    """The model as onnxsim simplifies it, constants as initializers, shapes inferred.

    Args:
        model: The model; not changed.
        work_dir: Where the two files go; they are removed.
        max_folded_bytes: Constants above this size are not folded.
        size_bytes: Size of the model, for the time that it may take.

    Raises:
        OnnxsimError: If onnxsim is missing, crashes, takes too long or writes nothing usable.
    """
    source, target = work_dir / "onnxsim-in.onnx", work_dir / "onnxsim-out.onnx"
    seconds = _BASE_SECONDS + _SECONDS_PER_MEGABYTE * size_bytes / 1e6
    command = [sys.executable, "-c", _SCRIPT, str(source), str(target), f"{max_folded_bytes}B"]
    try:
        model_io.save(model, source)
        subprocess.run(command, check=True, capture_output=True, timeout=seconds)  # noqa: S603
        result = model_io.load(target)
        model_io.normalize(result, min_opset=1)
    except subprocess.TimeoutExpired as error:
        raise OnnxsimError(f"onnxsim took more than {seconds:.0f} s") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        said = f": {lines[-1][:200]}" if lines else ""
        raise OnnxsimError(f"onnxsim ended with code {error.returncode}{said}") from error
    except OSError as error:
        raise OnnxsimError(f"onnxsim could not be started: {error}") from error
    except ModelError as error:
        raise OnnxsimError(f"onnxsim wrote an unusable model: {error.message}") from error
    finally:
        for path in work_dir.glob("onnxsim-*.onnx*"):
            path.unlink(missing_ok=True)
    return result
