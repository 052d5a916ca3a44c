"""Hardware profiles: what the integer kernels of a target want.

A profile says how to quantize so that the result is right and fast there; it names no product. The
facts behind the table, measured with onnxruntime:

- x86 computes ``uint8 activation x int8 weight``. With VNNI the products are summed in 32 bits.
  Without it two neighbouring products are first summed in 16 bits and saturate (2 * 255 * 127 >
  32767), so weights keep 7 bits there (``reduce_range``), which costs accuracy (4 points of top-1
  on a MobileNet) and is not done elsewhere.
- ARM multiplies ``int8 x int8``. Activations keep a zero point of their own: with it fixed at 0 a
  Relu cannot be performed by saturation, and onnxruntime then finds no integer kernel for the
  convolution before it.
- TensorRT multiplies ``int8 x int8`` and takes no zero point but 0.
- QNN takes uint8 activations with a zero point (onnxruntime's own configuration for it,
  ``quantization/execution_providers/qnn/quant_config.py``) and int8 weights per channel in Conv
  (onnxruntime pull requests 20154 and 25986).
- OpenVINO takes uint8 activations with a zero point and symmetric int8 weights (its "Low Precision
  IR" and quantization scheme pages).
- Phones follow LiteRT's 8-bit specification (ai.google.dev/edge/litert, "quantization_spec"): int8
  activations with a zero point, weights in [-127, 127] with zero point 0 per channel, and pools
  whose output has the scale of their input. Its Concat wants one scale for all of its tensors; that
  is done where no Relu and no much finer branch is lost by it.
- Kernels work on blocks of channels; a count that is no multiple of the block can be slower than no
  pruning.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import difflib
import importlib
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from onnxcompress.errors import UsageError

_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Target:
    """What a hardware target wants.

    Attributes:
        name: As on the command line.
        activation_dtype: Integer type of quantized activations.
        symmetric_activations: Whether the zero point of activations is the middle of the range.
        reduce_range: Whether weights keep 7 bits, [-64, 64], so that 16-bit sums of two products
            cannot saturate.
        channel_alignment: Channel counts should be multiples of this.
        summary: One sentence for users.
        on_cpu: Whether onnxruntime's CPU kernels run the result: only then does this machine's
            clock say anything, and only they need integers between nodes that move them.
        tied_operators: Operators whose output must have the scale of their input, beside those that
            only move values.
    """

    name: str
    activation_dtype: Literal["uint8", "int8"]
    symmetric_activations: bool
    reduce_range: bool
    channel_alignment: int
    summary: str = ""
    on_cpu: bool = True
    tied_operators: frozenset[str] = frozenset()


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            Target("x86-vnni", "uint8", False, False, 16, "x86-64 with AVX-512 VNNI or AVX-VNNI"),
            Target("x86-avx2", "uint8", False, True, 8, "x86-64 without VNNI: weights in 7 bits"),
            Target("arm64", "int8", False, False, 8, "64-bit ARM (Apple, Graviton, phones)"),
            Target("cuda", "int8", True, False, 8, "NVIDIA GPUs", on_cpu=False),
            Target("tensorrt", "int8", True, False, 8, "NVIDIA GPUs (TensorRT)", on_cpu=False),
            Target("qnn", "uint8", False, False, 8, "Qualcomm NPUs (QNN HTP)", on_cpu=False),
            Target(
                "openvino",
                "uint8",
                False,
                False,
                16,
                "Intel (OpenVINO)",
                on_cpu=False,
            ),
            Target(
                "mobile",
                "int8",
                False,
                False,
                8,
                "phones (XNNPACK, NNAPI, LiteRT's specification)",
                on_cpu=False,
                tied_operators=frozenset({"AveragePool", "GlobalAveragePool"}),
            ),
            Target(
                "generic", "uint8", False, True, 8, "any CPU: the choices that are safe everywhere"
            ),
        )
    }
)


def target_by_name(name: str) -> Target:
    """The profile called ``name``; ``"auto"`` is this machine's.

    Raises:
        UsageError: If there is no such profile.
    """
    if name == "auto":
        return detect_target()
    if name not in TARGETS:
        near = difflib.get_close_matches(name, TARGETS, n=1)
        guess = f"Did you mean '{near[0]}'? " if near else ""
        raise UsageError(
            f"there is no target '{name}'",
            hint=f"{guess}The targets are: auto, {', '.join(TARGETS)}.",
        )
    return TARGETS[name]


def detect_target() -> Target:
    """The profile of the CPU that this process runs on.

    An x86 whose features cannot be read counts as one without VNNI, which is right everywhere and
    costs some accuracy. A GPU is never chosen by itself: ask for ``cuda``.
    """
    return target_for(platform.machine(), cpu_features())


def target_for(machine: str, features: frozenset[str]) -> Target:
    """The profile of a CPU.

    Args:
        machine: Architecture as :func:`platform.machine` says it, in any case.
        features: Lower-case feature names without separators (``"avx2"``, ``"avx512vnni"``).
    """
    machine = machine.lower()
    if machine in {"arm64", "aarch64"}:
        return TARGETS["arm64"]
    if machine in {"x86_64", "amd64"}:
        vnni = not features.isdisjoint({"avx512vnni", "avxvnni"})
        return TARGETS["x86-vnni" if vnni else "x86-avx2"]
    return TARGETS["generic"]


def cpu_features() -> frozenset[str]:
    """Features of this CPU: lower-case names without ``_`` or ``.``; empty when unreadable.

    Read from ``/proc/cpuinfo`` on Linux and ``sysctl`` on macOS, and from numpy's own detection
    everywhere (it is what there is on Windows; it does not know AVX-VNNI). No subprocess is
    started.
    """
    found = _numpy_features()
    if sys.platform == "linux":
        found |= parse_cpuinfo(_CPUINFO)
    elif sys.platform == "darwin":
        found |= _sysctl_features()
    return frozenset(found)


def parse_cpuinfo(path: Path) -> set[str]:
    """Feature names of the first processor of a Linux ``cpuinfo`` file; empty when unreadable."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in {"flags", "features"}:
            return _clean(value)
    return set()


def _clean(text: str) -> set[str]:
    return set(text.lower().replace("_", "").replace(".", "").split())


def _numpy_features() -> set[str]:
    for name in ("numpy._core._multiarray_umath", "numpy.core._multiarray_umath"):
        try:
            table = getattr(importlib.import_module(name), "__cpu_features__", None)
        except ImportError:
            continue
        if isinstance(table, dict):
            features = {str(key).lower().replace("_", "") for key, has in table.items() if has}
            # Older numpy names only the group of features that came with Ice Lake.
            return features | ({"avx512vnni"} if "avx512icl" in features else set())
    return set()


def _sysctl_features() -> set[str]:
    """x86 features from macOS; an ARM Mac has none of these keys and needs none."""
    library = ctypes.util.find_library("c")
    if library is None:
        return set()
    libc = ctypes.CDLL(library)
    found: set[str] = set()
    for key in (b"machdep.cpu.features", b"machdep.cpu.leaf7_features"):
        buffer = ctypes.create_string_buffer(4096)
        size = ctypes.c_size_t(len(buffer))
        if libc.sysctlbyname(key, buffer, ctypes.byref(size), None, ctypes.c_size_t(0)) == 0:
            found |= _clean(buffer.value.decode("ascii", errors="replace"))
    return found
