"""Statistics of a model that is being refitted beside the original, every node run once.

What lies before a layer is final by the time the layer is refitted. So both networks, joined into
one graph, run stage by stage (:mod:`onnxcompress.passes.prune.stages`): a stage goes on from the
values that earlier ones left, with the weights as they are by then, and statistics are taken of the
values that it keeps. Reading all data through both networks for every layer would cost as many
times more as there are layers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.calibration.checks import Layout
from onnxcompress.calibration.collector import collect
from onnxcompress.calibration.dataset import Dataset
from onnxcompress.calibration.join import join
from onnxcompress.calibration.statistics import CrossMomentsRequest, CrossMomentsResult
from onnxcompress.context import PassContext
from onnxcompress.errors import ModelError
from onnxcompress.graph.constants import constant_of, set_initializer
from onnxcompress.passes.prune.stages import plan_stages
from onnxcompress.passes.prune.store import ActivationStore
from onnxcompress.passes.prune.stream import Stream, StreamOwner

Array = npt.NDArray[np.generic]


class Staged(StreamOwner):
    """A changing model and its reference on their way through the samples.

    Args:
        model: The model; it is not changed.
        reference: What it is compared with, a model with the same inputs.
        steps: What to measure at each step; later steps may lie anywhere behind earlier ones.
        written: Initializers of ``model`` that will get new values.
        parts: The samples, in parts that are measured apart.
        ctx: The job.

    Attributes:
        model: A copy of ``model`` with the reference in it; nodes and initializers of ``model``
            keep their names. New weights go here before the next step.
    """

    def __init__(
        self,
        model: ir.Model,
        reference: ir.Model,
        steps: Sequence[Sequence[CrossMomentsRequest]],
        written: Iterable[str],
        parts: Sequence[Dataset],
        ctx: PassContext,
    ) -> None:
        self.model = model_io.clone(model)
        for name in written:
            array = constant_of(self.model.graph.initializers[name])
            if array is not None:
                # An equal tensor of its own, for the reference must keep the old weights.
                set_initializer(self.model.graph, name, array)
        joined = join(self.model, reference)
        self._names = {name: value.name or "" for name, value in joined.items()}
        self._steps = [{r: self._renamed(r) for r in step} for step in steps]
        wanted = [
            tuple(dict.fromkeys(n for r in step.values() for n in _values(r)))
            for step in self._steps
        ]
        self._stages = plan_stages(self.model.graph, wanted)
        self._parts, self._ctx = parts, ctx
        self._size = max(ctx.batch_size, 1)

    def measure(
        self, step: int, text: str
    ) -> list[Mapping[CrossMomentsRequest, CrossMomentsResult]]:
        """What was asked for at a step, for each part of the samples.

        Where a batch finds no memory, or the model refuses it, they start again with half of it.

        Args:
            step: Number of the step, from 0; not less than before.
            text: What to call the work.

        Raises:
            DataError: If a tensor is NaN or infinite on a sample.
            ModelError: If a part of the graph does not run.
            MemoryError: If there is not enough memory for one sample.
        """
        while True:
            try:
                if self._stream is None:
                    self._stream = Stream(
                        self.model,
                        self._stages,
                        _Chained(self._parts),
                        self._ctx,
                        self._size,
                        ActivationStore(self._ctx.work_dir),
                    )
                self._stream.advance(step + 1, text)
                return [
                    self._collected(step, samples, text) for samples in self._kept(self._stream)
                ]
            except (MemoryError, ModelError):
                self._release()
                if self._size == 1 or any(p.layout.group is not None for p in self._parts):
                    raise
                self._size //= 2

    def _kept(self, stream: Stream) -> Iterator[_Kept]:
        """The runs of each part."""
        counts = stream.counts
        first = 0
        for part in self._parts:
            last, left = first, part.sample_count
            while left > 0:
                left -= counts[last]
                last += 1
            yield _Kept(stream, slice(first, last), part.sample_count, self._size)
            first = last

    def _collected(
        self, step: int, kept: _Kept, text: str
    ) -> Mapping[CrossMomentsRequest, CrossMomentsResult]:
        requests = self._steps[step]
        kept.names = tuple(dict.fromkeys(n for r in requests.values() for n in _values(r)))
        found = collect(
            self._holding(kept),
            requests.values(),
            kept,
            settings=self._ctx.session,
            batch_size=self._size,
            seed=self._ctx.seed,
            work_dir=self._ctx.work_dir,
            progress=self._ctx.progress,
            description=text,
        )
        return {request: found[renamed] for request, renamed in requests.items()}

    def _holding(self, kept: _Kept) -> ir.Model:
        """A model without nodes whose inputs are the kept values."""
        values = []
        for name in kept.names:
            dtype, shape = kept.kind(name)
            values.append(
                ir.Value(
                    name=name,
                    type=ir.TensorType(ir.DataType.from_numpy(dtype)),
                    shape=ir.Shape(shape),
                )
            )
        imports = dict(self.model.opset_imports)
        graph = ir.Graph(values, values[:1], nodes=[], opset_imports=imports, name="kept")
        return ir.Model(graph, ir_version=self.model.ir_version)

    def _renamed(self, request: CrossMomentsRequest) -> CrossMomentsRequest:
        """The request by the names of the joined graph."""
        return dataclasses.replace(
            request,
            value=self._names.get(request.value, request.value),
            target=tuple((self._names.get(n, n), sign) for n, sign in request.target),
        )


def _values(request: CrossMomentsRequest) -> tuple[str, ...]:
    return (request.value, *(name for name, _ in request.target))


class _Chained:
    """Several sets of samples, one after the other."""

    def __init__(self, parts: Sequence[Dataset]) -> None:
        self._parts = parts
        self.sample_count = sum(part.sample_count for part in parts)
        self.layout = parts[0].layout

    def counted_batches(self, batch_size: int) -> Iterator[tuple[int, dict[str, Array]]]:
        """See :class:`onnxcompress.calibration.dataset.Samples`."""
        return itertools.chain.from_iterable(p.counted_batches(batch_size) for p in self._parts)

    def first(self) -> dict[str, Array]:
        """See :class:`onnxcompress.calibration.dataset.Samples`."""
        return self._parts[0].first()


class _Kept:
    """Some runs of a stream as samples of a model that has the kept values as inputs.

    A run is not divided: the first axis of what is kept need not count samples.
    """

    def __init__(self, stream: Stream, runs: slice, sample_count: int, size: int) -> None:
        self._stream, self._runs = stream, runs
        self.sample_count = sample_count
        self.layout = Layout(group=size)
        self.names: tuple[str, ...] = ()

    def counted_batches(self, batch_size: int) -> Iterator[tuple[int, dict[str, Array]]]:
        """See :class:`onnxcompress.calibration.dataset.Samples`."""
        del batch_size
        return self._stream.feeds(self.names, self._runs)

    def first(self) -> dict[str, Array]:
        """See :class:`onnxcompress.calibration.dataset.Samples`."""
        return next(self.counted_batches(1))[1]

    def kind(self, name: str) -> tuple[np.dtype[np.generic], tuple[int | None, ...]]:
        """Element type and lengths of the axes; None where they differ, or count samples."""
        counts = self._stream.counts[self._runs]
        dtype, shapes = self._stream.shapes(name, self._runs)
        lengths = [
            found[0] if len(set(found)) == 1 else None for found in zip(*shapes, strict=True)
        ]
        if lengths and all(s[0] == n for s, n in zip(shapes, counts, strict=True)):
            lengths[0] = None
        return dtype, tuple(lengths)
