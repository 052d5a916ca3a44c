"""Small models and shortcuts shared by the tests of calibration."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir

from onnxcompress.calibration.collector import collect
from onnxcompress.calibration.dataset import Dataset
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.calibration.statistics import ConvUnfold, Request, Statistics
from onnxcompress.interface import TensorSpec, input_specs
from onnxcompress.progress import SilentProgress
from onnxcompress.runtime import SessionSettings, open_session

Array: TypeAlias = npt.NDArray[np.generic]


def parse(
    text: str,
    constants: Mapping[str, Array] | None = None,
    *,
    opset: int = 18,
    ir_version: int = 8,
) -> ir.Model:
    """A model from the text of its graph, constants as initializers."""
    header = f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>'
    proto = onnx.parser.parse_model(header + text)
    for name, array in (constants or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def identity(rank: int, dtype: str = "float", *, opset: int = 18, batch: str = "N") -> ir.Model:
    """``y = x + x``, so that ``x`` and ``y`` can be tapped; dynamic axes."""
    axes = ", ".join([batch, *(f"D{i}" for i in range(1, rank))][:rank])
    shape = f"[{axes}]"
    return parse(f"g ({dtype}{shape} x) => ({dtype}{shape} y) {{ y = Add(x, x) }}", opset=opset)


def specs(*shapes: Sequence[int | str] | None, dtype: str = "float32") -> tuple[TensorSpec, ...]:
    """Inputs ``x``, ``x1``, ``x2``, ... of these shapes."""
    return tuple(
        TensorSpec(f"x{i or ''}", np.dtype(dtype), None if s is None else tuple(s))
        for i, s in enumerate(shapes)
    )


def gather(
    model: ir.Model,
    requests: Iterable[Request],
    data: Mapping[str, Array] | Dataset,
    *,
    batch_size: int = 3,
    reference: ir.Model | None = None,
    seed: int = 0,
    finite_only: bool = False,
) -> Statistics:
    """``collect`` with defaults."""
    dataset = data if isinstance(data, Dataset) else open_dataset(data, input_specs(model))
    with tempfile.TemporaryDirectory() as folder:
        return collect(
            model,
            requests,
            dataset,
            reference=reference,
            settings=SessionSettings(threads=1),
            batch_size=batch_size,
            seed=seed,
            work_dir=Path(folder),
            progress=SilentProgress(),
            description="testing",
            finite_only=finite_only,
        )


def savez(path: Path, arrays: Mapping[str, Array], *, compressed: bool = False) -> None:
    """``numpy.savez`` for names that are no identifiers."""
    save = np.savez_compressed if compressed else np.savez
    save(path, **dict(arrays))  # type: ignore[arg-type]


def run(model: ir.Model, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """All outputs for one run."""
    return open_session(model, SessionSettings(threads=1)).run(feeds)


def im2col(x: npt.NDArray[np.floating], unfold: ConvUnfold) -> npt.NDArray[np.float64]:
    """Rows [G, N, D] by plain loops over samples, positions, channels and taps."""
    batch, channels, *lengths = x.shape
    rank = len(lengths)
    begins, ends = unfold.pads[:rank], unfold.pads[rank:]
    pads = [(0, 0), (0, 0), *zip(begins, ends, strict=True)]
    padded = np.pad(x.astype(np.float64), pads)
    outputs = [
        (padded.shape[i + 2] - (unfold.kernel[i] - 1) * unfold.dilations[i] - 1)
        // unfold.strides[i]
        + 1
        for i in range(rank)
    ]
    width = channels // unfold.groups
    rows = np.zeros((unfold.groups, batch * int(np.prod(outputs)), width * unfold.taps))
    for group in range(unfold.groups):
        row = 0
        for sample in range(batch):
            for place in np.ndindex(*outputs):
                column = 0
                for channel in range(group * width, (group + 1) * width):
                    for tap in np.ndindex(*unfold.kernel):
                        at = tuple(
                            place[i] * unfold.strides[i] + tap[i] * unfold.dilations[i]
                            for i in range(rank)
                        )
                        rows[group, row, column] = padded[(sample, channel, *at)]
                        column += 1
                row += 1
    return rows
