"""One run of a graph over the samples that stops where statistics are taken, and goes on later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.dataset import Samples
from onnxcompress.context import PassContext
from onnxcompress.passes.prune.stages import Stage
from onnxcompress.passes.prune.store import ActivationStore, Handle
from onnxcompress.runtime import Session, open_session

Array = npt.NDArray[np.generic]


@dataclass(slots=True)
class _Batch:
    """What is kept of one run: its number of samples, and arrays by name of the value."""

    count: int
    kept: dict[str, Handle] = field(default_factory=dict)


class Stream:
    """The samples on their way through a graph, stage by stage.

    Args:
        model: The graph. Weights that stages still to come read may change between stages.
        stages: How it is divided.
        data: The samples.
        ctx: How to run.
        batch_size: Samples per run.
        store: Where activations are kept.
    """

    def __init__(
        self,
        model: ir.Model,
        stages: Sequence[Stage],
        data: Samples,
        ctx: PassContext,
        batch_size: int,
        store: ActivationStore,
    ) -> None:
        self._model, self._stages, self._data = model, stages, data
        self._ctx, self._size, self._store = ctx, batch_size, store
        self._batches: list[_Batch] = []
        self._done = 0

    @property
    def sample_count(self) -> int:
        """Number of samples."""
        return self._data.sample_count

    @property
    def run_count(self) -> int:
        """Number of runs, once the first stage is done."""
        return len(self._batches)

    def advance(self, count: int, description: str) -> None:
        """Run until ``count`` stages are done.

        Raises:
            ModelError: If a part of the graph does not run.
            MemoryError: If there is not enough memory for one batch.
        """
        for stage in self._stages[self._done : count]:
            session = self._session(stage)
            with self._ctx.progress.task(description, self.sample_count) as task:
                if self._done == 0:
                    for samples, feeds in self._data.counted_batches(self._size):
                        batch = _Batch(samples)
                        self._run(session, stage, batch, feeds)
                        self._batches.append(batch)
                        task.advance(samples)
                else:
                    for batch in self._batches:
                        feeds = {n: self._store.get(batch.kept[n]) for n in stage.inputs}
                        self._run(session, stage, batch, feeds)
                        task.advance(batch.count)
            self._done += 1

    def _run(
        self, session: Session | None, stage: Stage, batch: _Batch, feeds: dict[str, Array]
    ) -> None:
        found = dict(feeds)
        if session is not None:
            found |= session.run({n: feeds[n] for n in stage.inputs})
        for name in stage.dropped:
            self._store.drop(batch.kept.pop(name))
        for name in stage.outputs:
            batch.kept[name] = self._store.put(found[name])

    def _session(self, stage: Stage) -> Session | None:
        inputs = {v.name for v in self._model.graph.inputs} if self._done == 0 else set()
        computed = [name for name in stage.outputs if name not in inputs]
        if not computed:
            return None
        part = (
            self._extracted(stage.inputs, computed)
            if self._done == 0
            else self.part(stage.inputs, computed)
        )
        return open_session(part, self._ctx.session, work_dir=self._ctx.work_dir)

    def part(
        self, inputs: Sequence[str], outputs: Sequence[str], weights: Sequence[str] = ()
    ) -> ir.Model:
        """The nodes between two sets of values.

        Args:
            inputs: Values that are kept now.
            outputs: Values that follow from them.
            weights: Initializers that become inputs too, whose values may be given for a run.
        """
        found = self._extracted([*inputs, *weights], outputs)
        for value in found.graph.inputs:
            if value.name in weights:
                continue
            sample = self._sample(value.name or "")
            value.dtype = ir.DataType.from_numpy(sample.dtype)
            value.shape = _believed(value.shape, sample.shape)
        return found

    def _extracted(self, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
        return ir.Model(
            ir.convenience.extract(self._model.graph, inputs, outputs),
            ir_version=self._model.ir_version,
            functions=tuple(self._model.functions.values()),
        )

    def _sample(self, name: str) -> Array:
        return self._store.get(self._batches[0].kept[name])

    @property
    def counts(self) -> list[int]:
        """Number of samples of each run, once the first stage is done."""
        return [batch.count for batch in self._batches]

    def shapes(
        self, name: str, runs: slice = slice(None)
    ) -> tuple[np.dtype[np.generic], list[tuple[int, ...]]]:
        """Element type of a kept value and its shape in each run."""
        handles = [batch.kept[name] for batch in self._batches[runs]]
        return handles[0].dtype, [handle.shape for handle in handles]

    def feeds(
        self, names: Sequence[str], runs: slice = slice(None)
    ) -> Iterator[tuple[int, dict[str, Array]]]:
        """The kept values of each run, with its number of samples."""
        for batch in self._batches[runs]:
            yield batch.count, {n: self._store.get(batch.kept[n]) for n in names}

    def close(self) -> None:
        """Drop everything that is kept."""
        for batch in self._batches:
            for handle in batch.kept.values():
                self._store.drop(handle)
        self._batches = []


class StreamOwner:
    """What holds a stream while it is entered, and may give it up before."""

    _stream: Stream | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._release()

    def _release(self) -> None:
        """Close the stream, if there is one."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _believed(declared: ir.Shape | None, seen: tuple[int, ...]) -> ir.Shape | None:
    """A declared shape without the lengths that the data contradict; exporters write such."""
    if declared is None or len(declared) != len(seen):
        return None
    return ir.Shape(
        [None if isinstance(d, int) and d != s else d for d, s in zip(declared, seen, strict=True)]
    )
