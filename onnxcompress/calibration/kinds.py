"""Element types and shapes of the tensors to be measured: as declared, else found by running."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.calibration.dataset import Samples
from onnxcompress.calibration.statistics import (
    AxisUnfold,
    CrossMomentsRequest,
    HistogramRequest,
    MomentsRequest,
    Request,
)
from onnxcompress.graph.naming import Namer
from onnxcompress.runtime import SessionSettings, open_session


@dataclass(frozen=True, slots=True)
class TensorKind:
    """What has to be known of a tensor to take statistics of it.

    Attributes:
        dtype: Element type.
        rank: Number of axes.
        sample: Lengths of the axes after the first, None where unknown; None when the first axis is
            not known to count samples.
    """

    dtype: ir.DataType
    rank: int
    sample: tuple[int | None, ...] | None


def declared_kind(value: ir.Value, group: int | None) -> TensorKind | None:
    """What the graph says of a tensor; None if it lacks the type or the rank.

    Args:
        value: The tensor.
        group: Samples per run where the model fixes it, else None.
    """
    if value.dtype is None or value.shape is None:
        return None
    lengths = tuple(length if isinstance(length, int) else None for length in value.shape)
    counts = bool(lengths) and lengths[0] in (None, group)
    return TensorKind(value.dtype, len(lengths), lengths[1:] if counts else None)


def tensors_of(request: Request) -> tuple[str, ...]:
    """Names of the tensors that a request reads."""
    if isinstance(request, CrossMomentsRequest):
        return (request.value, *(name for name, _ in request.target))
    return (request.value,)


def wants_lengths(request: Request, kind: TensorKind) -> bool:
    """Whether knowing the lengths of the tensor would save work, and some are unknown."""
    if isinstance(request, HistogramRequest):
        return request.max_elements is not None and None in (kind.sample or ())
    if not isinstance(request, MomentsRequest | CrossMomentsRequest) or kind.sample is None:
        return False
    if isinstance(request.unfold, AxisUnfold):
        axis = request.unfold.axis % kind.rank if kind.rank else 0
        others = [length for i, length in enumerate(kind.sample, 1) if i != axis]
        return request.max_rows is not None and None in others
    return None in kind.sample[1:]


def measured_kinds(
    model: ir.Model,
    names: Mapping[str, bool],
    dataset: Samples,
    settings: SessionSettings,
    work_dir: Path,
) -> dict[str, TensorKind]:
    """Run the smallest batch and look.

    Args:
        model: The model.
        names: The tensors to look at, each with whether its element type is known.
        dataset: The samples.
        settings: How to run.
        work_dir: Folder for scratch files.

    Raises:
        ModelError: If the model does not run.
    """
    model = model_io.clone(model)
    graph, namer = model.graph, Namer(model)
    values = {value.name: value for value in (*graph.inputs, *graph.initializers.values())}
    values |= {value.name: value for node in graph for value in node.outputs}
    shapes, outputs = {}, []
    for name, typed in names.items():
        value, seen = values[name], namer.value(f"{name}/calibrate_shape")
        node = ir.node("Shape", [value], outputs=[ir.Value(name=seen)], name=namer.node(seen))
        graph.append(node)
        shapes[name] = seen
        outputs.append(node.outputs[0])
        if not typed and value.producer() is not None:
            outputs.append(value)
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    feeds = dataset.first()
    found = {**feeds, **open_session(model, settings, work_dir=work_dir).run(feeds)}
    group = dataset.layout.group or 1
    kinds = {}
    for name in names:
        shape = tuple(int(length) for length in found[shapes[name]].astype(int))
        dtype = values[name].dtype
        if dtype is None:
            dtype = ir.DataType.from_numpy(found[name].dtype)
        counts = bool(shape) and shape[0] == group
        kinds[name] = TensorKind(dtype, len(shape), shape[1:] if counts else None)
    return kinds
