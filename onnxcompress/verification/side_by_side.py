"""Original against result: the same inputs through both, what each weighs, and which is faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.calibration.padding import without_padding
from onnxcompress.calibration.sources import Dataset
from onnxcompress.errors import ModelError
from onnxcompress.interface import input_specs, output_specs
from onnxcompress.output import scratch
from onnxcompress.progress import Progress, SilentProgress
from onnxcompress.runtime import Session, SessionSettings, compare_latency, open_session
from onnxcompress.verification.compare import Comparison, compare_outputs, interface_changes
from onnxcompress.verification.footprint import Footprint, load_times, peak_memory, weigh
from onnxcompress.verification.gates import GateOutcome, Gates, judge
from onnxcompress.verification.metrics import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Latency of both models, measured in turns on the same inputs.

    Attributes:
        batch_size: Samples per run.
        threads: Threads inside one operator; 0 means all cores.
        speedup_ratio: Median of original time / result time; above 1 the result is faster.
        speedup_low_ratio: 10th percentile of the ratio.
        speedup_high_ratio: 90th percentile of the ratio.
        original_ms: Median time of one run of the original.
        result_ms: Median time of one run of the result.
        runs: Pairs measured.
    """

    batch_size: int
    threads: int
    speedup_ratio: float
    speedup_low_ratio: float
    speedup_high_ratio: float
    original_ms: float
    result_ms: float
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Everything measured on a pair of models.

    Attributes:
        original: What the original weighs.
        result: What the result weighs; None when it does not load.
        comparison: How near the outputs are.
        gates: The limits and what was measured against them.
        enforced: Whether a missed limit fails.
        timings: Latency, one entry per batch size and number of threads.
        data: What the inputs were.
        synthetic: Whether the inputs were invented.
        providers: Execution providers in use.
        warnings: What the user should know before trusting the figures, one sentence each.
    """

    original: Footprint
    result: Footprint | None
    comparison: Comparison
    gates: tuple[GateOutcome, ...]
    enforced: bool
    timings: tuple[Timing, ...]
    data: str
    synthetic: bool
    providers: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is fatal and every enforced limit was kept."""
        kept = all(gate.passed for gate in self.gates) or not self.enforced
        return kept and not self.comparison.fatal

    @property
    def failures(self) -> tuple[str, ...]:
        """Why the verification failed, or would have if limits were enforced; one sentence each."""
        return (*self.comparison.fatal, *(str(gate) for gate in self.gates if not gate.passed))


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two models."""

    path: Path
    model: ir.Model


def verify_models(
    original: Path,
    result: Path,
    data: Dataset,
    *,
    gates: Gates | None = None,
    settings: SessionSettings | None = None,
    batch_size: int = 8,
    latency_threads: Sequence[int] = (1,),
    measure: bool = True,
    progress: Progress | None = None,
) -> Verification:
    """Compare two model files on ``data``.

    Args:
        original: The model before.
        result: The model after.
        data: Inputs, checked against the original.
        gates: Limits; the default gate when None.
        settings: How to run both (providers, threads).
        batch_size: Samples per run while comparing, and the larger batch of the latency.
        latency_threads: Numbers of threads to measure latency with.
        measure: Whether to measure latency, load time and peak memory.
        progress: Where to report progress.

    Raises:
        ModelError: If the original cannot be loaded or run.
        DataError: If the data cannot be read, or labels fit no output.
    """
    gates, settings = gates or Gates(), settings or SessionSettings()
    progress = progress or SilentProgress()
    before = _load(original)
    first = open_session(original, settings)
    feeds = data.first()
    after, second, fatal = _open_result(before, result, settings)
    comparison = Comparison(fatal=fatal)
    compared = data
    if after is not None and second is not None and not fatal:
        compared = _counted(data, first)
        comparison = compare_outputs(
            first, second, compared, batch_size=batch_size, progress=progress
        )
    del first, second
    runs = measure and after is not None and not comparison.fatal
    memory = _memory((before, after), feeds, settings, progress) if runs else {}
    loads = load_times((original, result), replace(settings, threads=1)) if runs else {}
    batches = _batches(data, batch_size)
    timings = _time(original, result, batches, settings, latency_threads, progress) if runs else ()
    weights = _weigh((before, after), feeds, memory, loads, progress)
    return Verification(
        original=weights[original],
        result=weights.get(result),
        comparison=comparison,
        gates=() if comparison.fatal else _judge(gates, comparison),
        enforced=gates.enforced,
        timings=timings,
        data=compared.description,
        synthetic=data.synthetic,
        providers=settings.providers,
        warnings=tuple(_warnings(data, comparison, timings)),
    )


def _counted(data: Dataset, session: Session) -> Dataset:
    """What counts of ``data``: not the positions that a mask tells the model to ignore."""
    return without_padding(data, lambda: session.run) or data


def time_models(
    original: Path,
    result: Path,
    data: Dataset,
    *,
    settings: SessionSettings,
    batch_sizes: Sequence[int],
    threads: Sequence[int],
    progress: Progress,
) -> Verification:
    """Weigh and time two model files without comparing their outputs.

    Raises:
        ModelError: If one of them cannot be loaded or run, or their interfaces differ.
    """
    before = _load(original)
    after, _, fatal = _open_result(before, result, settings)
    if after is None or fatal:
        raise ModelError(f"the two models cannot be timed on the same inputs: {'; '.join(fatal)}")
    feeds = data.first()
    memory = _memory((before, after), feeds, settings, progress)
    batches: dict[int, Mapping[str, Array]] = {}
    for size in batch_sizes:
        samples, batch = next(data.counted_batches(size))
        batches[samples] = batch
    loads = load_times((original, result), replace(settings, threads=1))
    weights = _weigh((before, after), feeds, memory, loads, progress)
    return Verification(
        original=weights[original],
        result=weights[result],
        comparison=Comparison(),
        gates=(),
        enforced=False,
        timings=_time(original, result, batches, settings, threads, progress),
        data=data.description,
        synthetic=data.synthetic,
        providers=settings.providers,
        warnings=(),
    )


def _load(path: Path) -> _Side:
    model = model_io.load(path)
    model_io.inline(model)  # what functions hold counts too
    return _Side(path, model)


def _open_result(
    before: _Side, result: Path, settings: SessionSettings
) -> tuple[_Side | None, Session | None, tuple[str, ...]]:
    """Load the result; what makes it unusable comes back as sentences."""
    if not result.is_file():
        raise ModelError(f"there is no file '{result}'")
    try:
        after = _load(result)
        changes = (
            *interface_changes(input_specs(before.model), input_specs(after.model), "input"),
            *interface_changes(output_specs(before.model), output_specs(after.model), "output"),
        )
    except ModelError as error:
        return None, None, (f"the result does not load: {error.message}",)
    if changes:
        return after, None, changes
    try:
        return after, open_session(result, settings), ()
    except ModelError as error:
        return after, None, (f"the result does not load: {error.message}",)


def _memory(
    sides: Sequence[_Side | None],
    feeds: Mapping[str, Array],
    settings: SessionSettings,
    progress: Progress,
) -> dict[Path, int | None]:
    measured: dict[Path, int | None] = {}
    single = replace(settings, threads=1)
    with (
        scratch() as folder,
        progress.task("measuring memory", len(sides)) as task,
    ):
        for side in sides:
            if side is not None:
                measured[side.path] = peak_memory(side.path, feeds, single, folder)
            task.advance()
    return measured


def _weigh(
    sides: Sequence[_Side | None],
    feeds: Mapping[str, Array],
    memory: Mapping[Path, int | None],
    loads: Mapping[Path, float],
    progress: Progress,
) -> dict[Path, Footprint]:
    weights: dict[Path, Footprint] = {}
    with progress.task("measuring sizes", len(sides)) as task:
        for side in sides:
            if side is not None:
                weights[side.path] = weigh(
                    side.path,
                    side.model,
                    feeds,
                    peak_memory_bytes=memory.get(side.path),
                    load_ms=loads.get(side.path),
                )
            task.advance()
    return weights


def _batches(data: Dataset, batch_size: int) -> dict[int, Mapping[str, Array]]:
    """Feeds of the smallest run and, where the model takes more at once, of a larger one."""
    made: dict[int, Mapping[str, Array]] = {}
    for size in (1, batch_size):
        samples, feeds = next(data.counted_batches(size))
        made[samples] = feeds
    return made


def _time(
    original: Path,
    result: Path,
    batches: Mapping[int, Mapping[str, Array]],
    settings: SessionSettings,
    threads: Sequence[int],
    progress: Progress,
) -> tuple[Timing, ...]:
    timings = []
    for count in threads:
        timed = replace(settings, threads=count)
        a, b = open_session(original, timed), open_session(result, timed)
        for samples, feeds in batches.items():
            latency = compare_latency(a, b, feeds, progress=progress)
            timings.append(
                Timing(
                    batch_size=samples,
                    threads=count,
                    speedup_ratio=latency.ratio,
                    speedup_low_ratio=latency.ratio_low,
                    speedup_high_ratio=latency.ratio_high,
                    original_ms=latency.a_ms,
                    result_ms=latency.b_ms,
                    runs=latency.runs,
                )
            )
    return tuple(timings)


def _judge(gates: Gates, comparison: Comparison) -> tuple[GateOutcome, ...]:
    return judge(gates, comparison.outputs, comparison.agreements, comparison.accuracy)


def _warnings(data: Dataset, comparison: Comparison, timings: Sequence[Timing]) -> list[str]:
    warnings = []
    if data.synthetic:
        warnings.append(
            "Verified on synthetic inputs: they show that the result runs, not how good it is. "
            "Give --eval, or put NAME.eval.npz beside NAME.onnx."
        )
    broken = [o.name for o in comparison.outputs if o.nonfinite_original]
    if broken:
        warnings.append(
            f"The original itself gives NaN or infinite values in {', '.join(broken)}; they are "
            "left out."
        )
    if data.labels is not None and comparison.samples and comparison.accuracy is None:
        warnings.append(
            "The labels fit no output: top-1 needs one whole number per sample, below the number "
            "of classes of an output [N, classes]."
        )
    slow = [t for t in timings if t.speedup_high_ratio < 1]
    if slow:
        t = slow[0]
        warnings.append(
            f"The result is slower than the original: {t.speedup_ratio:.2f}× at batch "
            f"{t.batch_size}."
        )
    return warnings
