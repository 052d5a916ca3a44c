"""Which samples calibrate and which verify: never the same ones when there is a choice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from onnxcompress.calibration.sources import (
    Dataset,
    DataSource,
    find_beside,
    open_dataset,
    synthetic_dataset,
)
from onnxcompress.errors import DataError, ModelError, UsageError
from onnxcompress.interface import input_specs
from onnxcompress.recipe import Recipe
from onnxcompress.verification.metrics import Array

Labels = str | Path | Array

_SYNTHETIC_SAMPLES = 64
_PARTS = 4
"""Of the only data given, at least a quarter verifies, and a quarter of evaluation data at most
calibrates."""


@dataclass(frozen=True, slots=True)
class JobData:
    """The samples of a run.

    Attributes:
        calibration: What passes calibrate on; None when no pass needs any.
        evaluation: What the result is verified on.
        notes: Which data were chosen and why, one sentence each.
        warnings: What weakens the figures, one sentence each.
    """

    calibration: Dataset | None
    evaluation: Dataset
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def choose_data(
    model: ir.Model,
    model_path: Path,
    recipe: Recipe,
    *,
    calib: DataSource | None,
    evaluation: DataSource | None,
    labels: Labels | None,
    needs_calibration: bool,
) -> JobData:
    """Open the samples to calibrate and to verify on.

    What is not given is looked for beside the model. One set alone serves both ways, in two parts
    that do not overlap. Without any, inputs are invented.

    Raises:
        DataError: If given data cannot be used with the model.
        UsageError: If labels are given without evaluation data.
        ModelError: If the model has no inputs.
    """
    if not input_specs(model):
        raise ModelError(
            "the model has no inputs, so there is nothing to verify a result on",
            hint="It always gives the same outputs: store these in place of the model.",
        )
    notes: list[str] = []
    evaluation = _or_beside(evaluation, model_path, "eval", notes)
    if labels is not None and evaluation is None:
        raise UsageError("labels are given without evaluation data", hint="Give --eval as well.")
    if needs_calibration or evaluation is None:
        calib = _or_beside(calib, model_path, "calib", notes)
    if calib is None and evaluation is None:
        return _synthetic(model, recipe, needs_calibration=needs_calibration)
    specs = input_specs(model)

    def opened(source: DataSource, given: Labels | None = None) -> Dataset:
        return open_dataset(source, specs, labels=given, image=recipe.image)

    if calib is not None and evaluation is not None and not _same(calib, evaluation):
        verify = _limit(opened(evaluation, labels), recipe.eval_samples)
        calibrate = _limit(opened(calib), recipe.calib_samples)
        if not needs_calibration:
            notes.append("No pass needs calibration, so the data for it are not used.")
        return JobData(calibrate if needs_calibration else None, verify, tuple(notes))
    if evaluation is not None:
        shared = opened(evaluation, labels)
        same = "--calib and --eval are the same data"
        why = "There are no --calib data" if calib is None else same
    else:
        assert calib is not None  # noqa: S101 - one of the two is there
        shared, why = opened(calib), "There are no --eval data"
    quarter = shared.sample_count // _PARTS
    most = quarter if calib is None else shared.sample_count - quarter
    return _shared(shared, recipe, notes, why, most, needs=needs_calibration)


def evaluation_data(
    model: ir.Model,
    model_path: Path,
    source: DataSource | None,
    *,
    labels: Labels | None = None,
    recipe: Recipe | None = None,
) -> Dataset:
    """The samples to compare two models on: given, found beside the first, or invented.

    Raises:
        DataError: If given data cannot be used with the model.
        UsageError: If labels are given without data.
    """
    chosen = choose_data(
        model,
        model_path,
        recipe or Recipe(),
        calib=None,
        evaluation=source,
        labels=labels,
        needs_calibration=False,
    )
    return chosen.evaluation


def _or_beside(
    given: DataSource | None, model_path: Path, role: Literal["calib", "eval"], notes: list[str]
) -> DataSource | None:
    if given is not None:
        return given
    found = find_beside(model_path, role)
    if found is not None:
        notes.append(f"Found {found.name} beside the model.")
    return found


def _same(first: DataSource, second: DataSource) -> bool:
    if isinstance(first, str | Path) and isinstance(second, str | Path):
        if Path(first).exists() and Path(second).exists():
            return Path(first).samefile(second)
        return str(first) == str(second)
    return first is second


def _limit(dataset: Dataset, samples: int | None) -> Dataset:
    return dataset if samples is None else dataset.take(samples)


def _shared(
    dataset: Dataset, recipe: Recipe, notes: list[str], why: str, most: int, *, needs: bool
) -> JobData:
    """Use one set both ways, in two parts where it is large enough.

    Args:
        dataset: All samples.
        recipe: The limits on both parts.
        notes: What was said of the data so far.
        why: Why there is one set, for the note.
        most: How many samples may calibrate.
        needs: Whether any pass needs calibration.
    """
    if not needs:
        return JobData(None, _limit(dataset, recipe.eval_samples), tuple(notes))
    total, group = dataset.sample_count, dataset.layout.group or 1
    count = min(recipe.calib_samples, most) // group * group
    if count < group or total - count < group:
        warning = (
            f"There are only {total} samples, so the result is verified on those that it was "
            "calibrated on; its figures are too good."
        )
        whole = _limit(dataset, recipe.calib_samples), _limit(dataset, recipe.eval_samples)
        return JobData(*whole, tuple(notes), (warning,))
    verify = _limit(dataset.skip(count), recipe.eval_samples)
    rest = verify.sample_count
    which = "the others" if rest == total - count else f"the next {rest}"
    note = f"{why}: {count} of {total} samples calibrate, {which} verify."
    return JobData(dataset.take(count), verify, (*notes, note))


def _synthetic(model: ir.Model, recipe: Recipe, *, needs_calibration: bool) -> JobData:
    """Invented samples, of another seed for each purpose."""
    samples = _SYNTHETIC_SAMPLES
    try:
        verify = synthetic_dataset(
            model, samples=min(samples, recipe.eval_samples or samples), seed=recipe.seed + 1
        )
        calibrate = None
        if needs_calibration:
            count = min(samples, recipe.calib_samples)
            calibrate = synthetic_dataset(model, samples=count, seed=recipe.seed)
    except DataError as error:
        raise DataError(
            f"there are no data, and inputs cannot be invented: {error.message}",
            hint="Give --eval (and --calib), or put NAME.eval.npz beside NAME.onnx.",
        ) from error
    warning = (
        "Calibrated on synthetic inputs, which real ones may be far from: expect a loss of "
        "accuracy. Give --calib, or put NAME.calib.npz beside NAME.onnx."
    )
    return JobData(calibrate, verify, (), (warning,) if needs_calibration else ())
