"""Whether a chain is faster than its layer, by the clock.

The layer is timed alone, on random data of the shape it sees in the model, against its chain, in
turns and with one thread (see :mod:`onnxcompress.passes.quant.clock`). Values do not matter for the
time, so one measurement serves before and after recovery.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.context import PassContext
from onnxcompress.graph.constants import constant_tensor
from onnxcompress.graph.cost import Shape
from onnxcompress.numerics.low_rank import Chain
from onnxcompress.passes.quant.clock import run_times
from onnxcompress.passes.svd.emit import Writer
from onnxcompress.passes.svd.sites import Site
from onnxcompress.runtime import Array, open_session

_SECONDS = 0.15
"""Time to measure one layer."""
_GAIN = 0.98
"""A chain must take no more than this part of its layer's time: less gain is noise."""


class Stopwatch:
    """Times chains of one model against their layers.

    Args:
        model: The model.
        shapes: Shapes of its values by name, for one run.
        ctx: The job.
    """

    def __init__(self, model: ir.Model, shapes: Mapping[str, Shape], ctx: PassContext) -> None:
        self._model, self._shapes, self._ctx = model, shapes, ctx
        self._nodes = {n.name or "": n for n in model.graph}

    def faster(self, site: Site, chains: Sequence[Chain]) -> bool:
        """Whether the chain takes clearly less time; False where that cannot be measured."""
        made = self._alone(site)
        if made is None:
            return False
        model, feeds = made
        variant = model_io.clone(model)
        Writer(variant).write(site, chains)
        before, after = self.times((model, variant), feeds)
        return after <= _GAIN * before

    def times(self, models: Sequence[ir.Model], feeds: Mapping[str, Array]) -> list[float]:
        """Seconds of one run of each model."""
        settings = dataclasses.replace(self._ctx.session, threads=1)
        sessions = [open_session(m, settings, work_dir=self._ctx.work_dir) for m in models]
        return run_times(sessions, feeds, seconds=_SECONDS * len(models))

    def _alone(self, site: Site) -> tuple[ir.Model, dict[str, Array]] | None:
        """A model of this one node, and inputs for it; None if a shape is unknown."""
        node = self._nodes[site.node]
        random = np.random.default_rng(0)
        inputs: dict[str, ir.Value] = {}
        constants: list[ir.Value] = []
        feeds: dict[str, Array] = {}
        arguments: list[ir.Value | None] = []
        for value in node.inputs:
            if value is None:
                arguments.append(None)
                continue
            name = value.name or ""
            tensor = constant_tensor(value)
            shape = self._shapes.get(name)
            if name not in inputs and tensor is not None:
                inputs[name] = ir.Value(
                    name=name, shape=value.shape, type=value.type, const_value=tensor
                )
                constants.append(inputs[name])
            elif name not in inputs:
                if shape is None or value.dtype is None or min(shape, default=1) < 1:
                    return None
                dtype = value.dtype.numpy()
                floats = dtype.kind == "f"
                data = random.standard_normal(shape) if floats else np.zeros(shape)
                feeds[name] = np.asarray(data, dtype)
                inputs[name] = ir.Value(
                    name=name, shape=ir.Shape(shape), type=ir.TensorType(value.dtype)
                )
            arguments.append(inputs[name])
        copy = ir.node(
            node.op_type,
            arguments,
            {a.name: a.value for a in node.attributes.values()} or None,
            domain=node.domain,
            num_outputs=len(node.outputs),
            name=node.name,
        )
        for new, old in zip(copy.outputs, node.outputs, strict=True):
            new.name = old.name
            if old.dtype is not None:
                new.type = ir.TensorType(old.dtype)
        outputs = [new for new in copy.outputs if new.name and new.type is not None]
        graph = ir.Graph(
            [inputs[n] for n in feeds],
            outputs,
            nodes=[copy],
            initializers=constants,
            opset_imports=dict(self._model.opset_imports),
            name="layer",
        )
        return ir.Model(graph, ir_version=self._model.ir_version), feeds
