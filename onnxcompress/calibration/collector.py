"""Running a model over samples to gather statistics, in memory that does not grow with the samples.

The statistics are nodes of the graph itself (:mod:`~onnxcompress.calibration.augment`), so tensors
are reduced where they arise and only small results leave onnxruntime. Across batches they add up in
float64 (:mod:`~onnxcompress.calibration.accumulate`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcompress.calibration.arrays import Array
from onnxcompress.calibration.augment import Augmented
from onnxcompress.calibration.dataset import Samples
from onnxcompress.calibration.feeds import RunFeeds, ShapesDifferError
from onnxcompress.calibration.kinds import measured_kinds
from onnxcompress.calibration.statistics import Request, Result, Statistics
from onnxcompress.calibration.taps import Tap
from onnxcompress.errors import DataError, ModelError
from onnxcompress.progress import Progress, Task
from onnxcompress.runtime import Session, SessionSettings, open_session

MAX_PASSES = 8
"""Readings of the data after which inexact quantiles are given up; each doubles what is kept."""


def collect(
    model: ir.Model,
    requests: Iterable[Request],
    dataset: Samples,
    *,
    reference: ir.Model | None = None,
    settings: SessionSettings,
    batch_size: int,
    seed: int,
    work_dir: Path,
    progress: Progress,
    description: str,
    finite_only: bool = False,
) -> Statistics:
    """Run ``model`` over ``dataset`` and gather the requested statistics.

    Args:
        model: The model; it is not changed.
        requests: What to measure. Duplicates are measured once.
        dataset: The samples.
        reference: A model with the same inputs, run on the same batches; its tensors are named with
            ``reference/`` in front.
        settings: How to run; ``low_memory`` is always switched on.
        batch_size: Samples per run. A batch that finds no memory, or that the model refuses, is
            halved until it runs.
        seed: Seed of the choice of rows.
        work_dir: Folder for scratch files.
        progress: Where to report progress, in samples.
        description: What to call the work there.
        finite_only: Leave results of tensors out that are NaN or infinite on a sample, as masks of
            attention are; else they are an error.

    Raises:
        DataError: If a tensor asked for is NaN or infinite on a sample, or data cannot be read.
        ModelError: If a tensor does not exist, or does not allow a statistic, or the model fails.
    """
    unique = tuple(dict.fromkeys(requests))
    if not unique:
        return Statistics({}, 0)
    settings = dataclasses.replace(settings, low_memory=True)
    for trust_shapes in (True, False):
        augmented = Augmented(
            model,
            reference,
            sample_count=dataset.sample_count,
            group=dataset.layout.group,
            trust_shapes=trust_shapes,
        )
        if unknown := augmented.unknown(unique):
            kinds = measured_kinds(augmented.model, unknown, dataset, settings, work_dir)
            augmented.learn(kinds)
        taps = [augmented.tap(request) for request in unique]
        augmented.finish()
        session = open_session(augmented.model, settings, work_dir=work_dir)
        runner = _Runner(session, augmented, dataset, batch_size, seed, finite_only=finite_only)
        try:
            results = _read_until_exact(runner, taps, progress, description)
        except ShapesDifferError:
            if not trust_shapes:
                raise
            continue
        except ModelError:
            # Rows chosen by wrong declared shapes may lie outside of the tensor.
            if not trust_shapes or not augmented.feeders:
                raise
            continue
        return Statistics({r: results[r] for r in unique if r in results}, dataset.sample_count)
    raise AssertionError  # the second round relies on no declared shape


def _read_until_exact(
    runner: _Runner, taps: Sequence[Tap], progress: Progress, description: str
) -> dict[Request, Result]:
    """Run all samples, and again where quantiles need more elements than were kept."""
    results: dict[Request, Result] = {}
    slack = 1.0
    for _ in range(MAX_PASSES):
        with progress.task(description, total=runner.sample_count) as task:
            runner.run(taps, slack, task)
        taps = [tap for tap in taps if tap.request.value not in runner.nonfinite]
        for tap in taps:
            result = tap.finish()
            if result is not None:
                results[tap.request] = result
        taps = [tap for tap in taps if tap.request not in results]
        if not taps:
            return results
        slack *= 2
    raise DataError(
        f"the quantiles of '{taps[0].request.value}' could not be found exactly: the samples "
        "differ too much in size",
        hint="Give samples of similar shapes.",
    )


class _Runner:
    """Feeds the batches of a dataset through an augmented model."""

    def __init__(
        self,
        session: Session,
        augmented: Augmented,
        dataset: Samples,
        batch_size: int,
        seed: int,
        *,
        finite_only: bool,
    ) -> None:
        self._session = session
        self._augmented = augmented
        self._dataset = dataset
        self.sample_count = dataset.sample_count
        self._batch_size = batch_size
        self._seed = seed
        self._limit: int | None = None
        self._finite_only = finite_only
        self.nonfinite: set[str] = set()  # left out from here on

    def run(self, taps: Sequence[Tap], slack: float, task: Task) -> None:
        """Run everything once and update the taps."""
        random = np.random.default_rng(self._seed)
        position = 0
        for count, feeds in self._dataset.counted_batches(self._batch_size):
            for run_count, outputs in self._run(count, feeds, slack, random):
                self._update(taps, outputs, position, run_count)
                position += run_count
                task.advance(run_count)

    def _run(
        self,
        count: int,
        feeds: Mapping[str, Array],
        slack: float,
        random: np.random.Generator,
    ) -> Iterator[tuple[int, Mapping[str, Array]]]:
        """Run a batch, in pieces if it does not run whole; each piece with its samples."""
        if self._limit is None or count <= self._limit:
            chosen = RunFeeds(count, self.sample_count, slack, random)
            extra = {name: fill(chosen) for name, fill in self._augmented.feeders.items()}
            try:
                outputs = self._session.run({**feeds, **extra})
            except (MemoryError, ModelError) as error:
                self._halve(count, error)
            else:
                yield count, outputs
                return
        size = self._limit or 1
        for low in range(0, count, size):
            high = min(low + size, count)
            piece = {name: array[low:high] for name, array in feeds.items()}
            yield from self._run(high - low, piece, slack, random)

    def _halve(self, count: int, error: MemoryError | ModelError) -> None:
        """Run at most half of ``count`` samples from now on, or give up."""
        if count > 1 and self._dataset.layout.group is None:
            self._limit = count // 2
            return
        if isinstance(error, ModelError):
            raise error
        raise ModelError(
            f"there is not enough memory to run the model on {count} sample{'s'[: count != 1]}",
            hint="Free memory, or use smaller inputs.",
        ) from error

    def _update(
        self, taps: Sequence[Tap], outputs: Mapping[str, Array], position: int, count: int
    ) -> None:
        going = (tap for tap in taps if tap.request.value not in self.nonfinite)
        bad = {name for tap in going if (name := tap.update(outputs, count)) is not None}
        if self._finite_only:
            self.nonfinite |= bad
        elif bad:
            name = min(bad, key=self._augmented.tapped_order)
            samples = f"sample {position}"
            if count > 1:
                samples = f"samples {position} to {position + count - 1}"
            raise DataError(
                f"tensor '{name}' ({self._augmented.origin(name)}) has NaN or infinite values on "
                f"{samples}",
                hint="Check the model and these samples: a float model must give finite values.",
            )
