"""From a model file to a smaller one: load, run the passes, check each, save, verify, publish."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

import onnxcompress
from onnxcompress import model_io
from onnxcompress._threads import linear_algebra
from onnxcompress.calibration.sources import Dataset, DataSource, ImageOptions
from onnxcompress.context import PassContext
from onnxcompress.contributions import Contribution, Contributions
from onnxcompress.errors import (
    DataError,
    ModelError,
    OnnxCompressError,
    PassError,
    UsageError,
)
from onnxcompress.graph.naming import used_names
from onnxcompress.interface import TensorSpec, input_specs, output_specs
from onnxcompress.output import check_output, check_sidecar, publish, scratch, staging
from onnxcompress.passes._subexpressions import drop_unused_constants
from onnxcompress.passes.base import PassReport
from onnxcompress.progress import Progress, SilentProgress
from onnxcompress.recipe import Recipe
from onnxcompress.result import CompressionResult, PassRun
from onnxcompress.runtime import SessionSettings, open_session, resolve_providers
from onnxcompress.schedule import Schedule, Step, plan_schedule
from onnxcompress.search.parallel import Workers
from onnxcompress.selection import Labels, choose_data
from onnxcompress.targets import target_by_name
from onnxcompress.verification.compare import interface_changes
from onnxcompress.verification.gates import Gates
from onnxcompress.verification.metrics import Array
from onnxcompress.verification.side_by_side import verify_models

METADATA_PREFIX = "onnxcompress."


def compress(
    input_path: str | Path,
    output_path: str | Path,
    *,
    passes: Sequence[str],
    calib: DataSource | None = None,
    eval: DataSource | None = None,  # noqa: A002 - the word users know from --eval
    labels: Labels | None = None,
    options: Mapping[str, Mapping[str, object]] | None = None,
    target: str = "auto",
    provider: str = "cpu",
    threads: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    calib_samples: int = 1024,
    eval_samples: int | None = None,
    image: ImageOptions | None = None,
    gates: Gates | None = None,
    simplify: bool = True,
    fold: bool = True,
    names: Literal["short", "all", "keep"] = "short",
    keep_failed: bool = False,
    dry_run: bool = False,
    measure: bool = True,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> CompressionResult:
    """Compress a model file and verify the result.

    Args:
        input_path: The model.
        output_path: Where the result goes; written only when it passes its verification.
        passes: Names of the passes, in any order.
        calib: Samples to calibrate on: a path, arrays by input name, a callable.
        eval: Samples to verify on.
        labels: Class numbers of the evaluation samples.
        options: Pass name to option name to value.
        target: Hardware profile, or "auto" for this machine.
        provider: "cpu", "cuda" or "auto".
        threads: Threads of onnxruntime; None takes all cores, and one for latency.
        batch_size: Samples per run.
        seed: Seed of everything random.
        calib_samples: Most samples to calibrate on.
        eval_samples: Most samples to verify on; None takes all.
        image: How to read folders of images.
        gates: Limits for the result; a default gate when None.
        simplify: Whether to add the simplify pass.
        fold: Whether to add the fold pass.
        names: What nodes and values inside the result are called: "short" keeps the names of the
            original and shortens those that passes made, "all" shortens both, "keep" none.
        keep_failed: Write the result even when it fails its verification.
        dry_run: Only say what would be done.
        measure: Whether to measure latency and peak memory.
        workers: How many processes measure versions of the model, and where. The result does not
            depend on it.
        progress: Where to report progress.

    Returns:
        What was done and measured. A result that fails its verification is no exception: see
        ``passed``.

    Raises:
        UsageError: If the request contradicts itself.
        ModelError: If the model cannot be used.
        DataError: If the data cannot be used.
        PassError: If a pass fails or breaks the model; nothing is written.
        OutputError: If the result cannot be written.
        ProviderError: If the provider is not there.
    """
    recipe = Recipe(
        passes=tuple(passes),
        options=options or {},
        target=target,
        provider=provider,
        threads=threads,
        batch_size=batch_size,
        seed=seed,
        calib_samples=calib_samples,
        eval_samples=eval_samples,
        image=image,
        gates=gates or Gates(),
        simplify=simplify,
        fold=fold,
        names=names,
    )
    return run_recipe(
        Path(input_path),
        Path(output_path),
        recipe,
        calib=calib,
        evaluation=eval,
        labels=labels,
        keep_failed=keep_failed,
        dry_run=dry_run,
        measure=measure,
        workers=workers,
        progress=progress or SilentProgress(),
    )


def run_recipe(
    original: Path,
    output: Path,
    recipe: Recipe,
    *,
    calib: DataSource | None,
    evaluation: DataSource | None,
    labels: Labels | None,
    keep_failed: bool,
    dry_run: bool,
    measure: bool,
    progress: Progress,
    workers: Workers | None = None,
) -> CompressionResult:
    """Do what :func:`compress` does, from a recipe.

    Raises:
        OnnxCompressError: As :func:`compress`.
    """
    check_output(original, output)
    schedule = plan_schedule(recipe)
    target = target_by_name(recipe.target)
    settings = SessionSettings(
        providers=resolve_providers(recipe.provider),
        threads=recipe.threads or 0,
        emulates=not target.on_cpu,
    )
    clock = _Clock(progress)
    with clock.stage("load"):
        model = model_io.load(original)
        check_sidecar(model, output)
        original_sha256 = model_io.sha256(original)
    boundary = _Boundary(input_specs(model), output_specs(model))
    with clock.stage("normalize"):
        notes = (*schedule.notes, *model_io.normalize(model))
        names = _names_to_keep(recipe, model)
    with scratch() as work_dir:
        with clock.stage("open"):
            open_session(original, settings)  # verification runs it as it is
            open_session(model, settings, work_dir=work_dir)
        with clock.stage("data"):
            data = choose_data(
                model,
                original,
                recipe,
                calib=calib,
                evaluation=evaluation,
                labels=labels,
                needs_calibration=schedule.needs_calibration(target),
            )
        context = PassContext(
            target=target,
            work_dir=work_dir,
            calibration=data.calibration,
            session=settings,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            progress=progress,
            goals=recipe.gates,
            original=original,
            workers=workers or Workers(),
            passes=tuple(step.name for step in schedule.steps),
        )
        verification, written = None, False
        if dry_run:
            runs = _plan(schedule, model, context, clock)
        else:
            contributions = None
            if len(recipe.passes) > 1:
                with clock.stage("reference"):
                    contributions = Contributions(
                        original, data.evaluation, settings, timed=measure, work_dir=work_dir
                    )
            with linear_algebra(model, recipe.threads):
                model, runs = _transform(
                    schedule, model, context, data.evaluation, boundary, contributions, clock
                )
            with staging(output) as staged:
                with clock.stage("save"):
                    metadata = _metadata(recipe, original_sha256)
                    model_io.save(model, staged, metadata=metadata, keep_names=names)
                with clock.stage("verify"):
                    verification = verify_models(
                        original,
                        staged,
                        data.evaluation,
                        gates=recipe.gates,
                        settings=settings,
                        batch_size=recipe.batch_size,
                        latency_threads=(recipe.threads or 1,),
                        measure=measure,
                        progress=progress,
                    )
                if verification.passed or keep_failed:
                    publish(staged, output)
                    written = True
    return CompressionResult(
        input_path=original,
        output_path=output,
        written=written,
        dry_run=dry_run,
        passes=runs,
        verification=verification,
        recipe=recipe,
        target=target.name,
        calibration=None if data.calibration is None else described(data.calibration),
        timings_s=clock.seconds,
        original_sha256=original_sha256,
        result_sha256=model_io.sha256(output) if written else None,
        version=onnxcompress.__version__,
        notes=(*notes, *data.notes),
        warnings=(
            *data.warnings,
            *(verification.warnings if verification else ()),
            *_unchanged(runs, dry_run=dry_run),
        ),
    )


def described(data: Dataset) -> str:
    """A data set in a few words."""
    return f"{data.sample_count} samples, {data.description}"


@dataclass(frozen=True, slots=True)
class _Boundary:
    """Inputs and outputs of the original, which no pass may change."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def check(self, model: ir.Model) -> None:
        """Raise a ModelError if ``model`` has others."""
        changes = (
            *interface_changes(self.inputs, input_specs(model), "input"),
            *interface_changes(self.outputs, output_specs(model), "output"),
        )
        if changes:
            raise ModelError("; ".join(changes))


class _Clock:
    """Seconds that each stage of a run took."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is done inside."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self._progress.log(f"{name}: {self.seconds[name]:.2f} s")


def _plan(
    schedule: Schedule, model: ir.Model, context: PassContext, clock: _Clock
) -> tuple[PassRun, ...]:
    """Ask every pass what it would touch; each sees the model as it is now."""
    runs = []
    for step in schedule.steps:
        name = f"plan {step.name}"
        with clock.stage(name), _blamed(step.name):
            report = step.instance.plan(model_io.clone(model), context)
        runs.append(_pass_run(step, report, clock.seconds[name]))
    return tuple(runs)


def _transform(
    schedule: Schedule,
    model: ir.Model,
    context: PassContext,
    evaluation: Dataset,
    boundary: _Boundary,
    contributions: Contributions | None,
    clock: _Clock,
) -> tuple[ir.Model, tuple[PassRun, ...]]:
    """Run the passes one after the other, each on a copy that is kept only when it is sound."""
    sample = evaluation.first()
    runs = []
    for step in schedule.steps:
        name = f"pass {step.name}"
        with clock.stage(name), _blamed(step.name), context.progress.task(step.name):
            candidate = model_io.clone(model)
            report = step.instance.run(candidate, context)
            drop_unused_constants(candidate)  # onnxruntime warns of them at every load
            _check_sound(candidate, sample, boundary, context)
        model = candidate
        after = None
        if contributions is not None and report.changes:
            with clock.stage(f"compare after {step.name}"):
                after = contributions.after(model)
        runs.append(_pass_run(step, report, clock.seconds[name], after))
    return model, tuple(runs)


def _check_sound(
    model: ir.Model, sample: Mapping[str, Array], boundary: _Boundary, context: PassContext
) -> None:
    """Check what a pass made: valid, the same interface, loads in onnxruntime and runs.

    Raises:
        ModelError: If one of these fails.
    """
    try:
        boundary.check(model)
        model_io.infer_shapes(model)
        model_io.check(model)
        open_session(model, context.session, work_dir=context.work_dir).run(sample)
    except ModelError as error:
        raise ModelError(
            f"the model it made is broken and was rolled back: {error.message}", hint=error.hint
        ) from error


@contextmanager
def _blamed(name: str) -> Iterator[None]:
    """Turn whatever goes wrong inside a pass into an error that names the pass.

    Errors about the request or the data keep their kind: the pass only found them.
    """
    try:
        yield
    except (PassError, UsageError, DataError):
        raise
    except OnnxCompressError as error:
        raise PassError(name, error.message, hint=error.hint) from error
    except MemoryError as error:
        raise PassError(
            name, "there is not enough memory", hint="Use a smaller --batch-size."
        ) from error
    except OSError as error:
        raise PassError(name, f"{error.strerror or error}: {error.filename or 'a file'}") from error
    except Exception as error:
        raise PassError(
            name,
            f"internal error, {type(error).__name__}: {error}",
            hint="This is a bug of the pass. Please report it with what --debug shows.",
        ) from error


def _unchanged(runs: Sequence[PassRun], *, dry_run: bool) -> Iterator[str]:
    """Say when the passes that were asked for came to nothing, which sizes alone may not show."""
    idle = [run.name for run in runs if not run.automatic and not run.report.changes]
    if idle and not dry_run:
        *others, last = (f"'{name}'" for name in idle)
        names, they = f"Pass {last}", "it"
        if others:
            names, they = f"Passes {', '.join(others)} and {last}", "they"
        yield f"{names} changed nothing: see what {they} skipped, and why, with -v."


def _pass_run(
    step: Step, report: PassReport, seconds: float, after: Contribution | None = None
) -> PassRun:
    return PassRun(
        name=step.name,
        stage=step.instance.stage,
        automatic=step.automatic,
        options=step.instance.options.to_dict(),
        report=report,
        seconds=seconds,
        after=after,
    )


def _names_to_keep(recipe: Recipe, model: ir.Model) -> Collection[str] | None:
    """Names that the result keeps, of a model that no pass has seen; None for all."""
    if recipe.names == "keep":
        return None
    return used_names(model) if recipe.names == "short" else ()


def _metadata(recipe: Recipe, original_sha256: str) -> dict[str, str]:
    """What the result file says about where it comes from."""
    return {
        f"{METADATA_PREFIX}version": onnxcompress.__version__,
        f"{METADATA_PREFIX}recipe": json.dumps(recipe.to_dict(), sort_keys=True),
        f"{METADATA_PREFIX}original_sha256": original_sha256,
    }
