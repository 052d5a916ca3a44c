"""Running two models on the same inputs, batch by batch; nothing accumulates but sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnxcompress.calibration.sources import Dataset
from onnxcompress.errors import DataError, ModelError
from onnxcompress.interface import TensorSpec
from onnxcompress.progress import Progress
from onnxcompress.runtime import Session
from onnxcompress.verification.classes import Accuracy, Agreement, ClassMeter
from onnxcompress.verification.metrics import Array, OutputFidelity, OutputMeter


@dataclass(frozen=True, slots=True)
class Comparison:
    """What running both models showed.

    Attributes:
        samples: Samples compared.
        outputs: One entry per output, in the order of the model.
        agreements: One entry per classifier-like output.
        accuracy: Top-1 of both, where labels fit an output.
        fatal: What makes the result unusable, one sentence each.
    """

    samples: int = 0
    outputs: tuple[OutputFidelity, ...] = ()
    agreements: tuple[Agreement, ...] = ()
    accuracy: Accuracy | None = None
    fatal: tuple[str, ...] = ()


def interface_changes(
    original: Sequence[TensorSpec], result: Sequence[TensorSpec], what: str
) -> tuple[str, ...]:
    """How inputs or outputs differ in names, order, element types or shapes, one sentence each.

    The names of dynamic axes may differ, and a shape that the original does not state may be
    stated.

    Args:
        original: Inputs or outputs of the original.
        result: The same of the result.
        what: "input" or "output", for messages.
    """
    names, new_names = [s.name for s in original], [s.name for s in result]
    if names != new_names:
        return (f"the {what}s changed from {', '.join(names)} to {', '.join(new_names)}",)
    return tuple(
        f"{what} '{before.name}' changed from {before} to {after}"
        for before, after in zip(original, result, strict=True)
        if before.dtype != after.dtype or not _same_shape(before, after)
    )


def _same_shape(before: TensorSpec, after: TensorSpec) -> bool:
    if before.shape is None:
        return True
    if after.shape is None or len(before.shape) != len(after.shape):
        return False
    return all(
        b == a if isinstance(b, int) else isinstance(a, str)
        for b, a in zip(before.shape, after.shape, strict=True)
    )


def compare_outputs(
    original: Session, result: Session, data: Dataset, *, batch_size: int, progress: Progress
) -> Comparison:
    """Run both models over ``data``.

    When a batch does not fit into memory, everything starts again with batches of half the size.

    Raises:
        DataError: If not even one sample fits into memory, or a sample cannot be read.
        ModelError: If the original does not run on the data.
    """
    while True:
        try:
            return _compare(original, result, data, batch_size, progress)
        except MemoryError as error:
            if batch_size <= 1 or data.layout.group is not None:
                raise DataError(
                    f"not enough memory to run both models on a batch of {batch_size}: {error}",
                    hint="Free memory, or use smaller inputs.",
                ) from error
            batch_size //= 2
            progress.log(f"Not enough memory: verifying {batch_size} samples at a time.")


def _compare(
    original: Session, result: Session, data: Dataset, batch_size: int, progress: Progress
) -> Comparison:
    meter = ComparisonMeter(original.inputs, original.outputs)
    labels = data.labels
    done = 0
    with progress.task("verifying", data.sample_count) as task:
        for samples, feeds in data.counted_batches(batch_size):
            wanted = _run_original(original, feeds, samples)
            try:
                got = result.run(feeds)
            except ModelError as error:
                return Comparison(fatal=(f"the result does not run: {error.message}",))
            batch_labels = None if labels is None else labels[done : done + samples]
            try:
                meter.update(wanted, got, samples, batch_labels)
            except ValueError as error:
                return Comparison(fatal=(str(error),))
            done += samples
            task.advance(samples)
    return meter.finish()


class ComparisonMeter:
    """Streams the outputs of two models into a :class:`Comparison`.

    Args:
        inputs: Inputs of the original.
        outputs: Outputs of the original.
    """

    def __init__(self, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self._samples = 0
        self._outputs = {spec.name: OutputMeter(spec.name) for spec in outputs}
        self._classes = {
            spec.name: ClassMeter(spec.name, may_be_logits=not _like_an_input(spec, inputs))
            for spec in outputs
        }

    def update(
        self,
        wanted: Mapping[str, Array],
        got: Mapping[str, Array],
        samples: int,
        labels: Array | None = None,
    ) -> None:
        """Add a batch of ``samples`` samples: outputs of the original and of the result.

        Raises:
            ValueError: If the shapes of an output differ.
        """
        for name, meter in self._outputs.items():
            meter.update(wanted[name], got[name], samples)
            self._classes[name].update(wanted[name], got[name], samples, labels)
        self._samples += samples

    def finish(self) -> Comparison:
        """What everything added so far showed."""
        return _conclude(self._samples, self._outputs, self._classes)


def _run_original(original: Session, feeds: Mapping[str, Array], samples: int) -> dict[str, Array]:
    try:
        return original.run(feeds)
    except ModelError as error:
        if samples == 1 or error.hint:
            raise
        hint = (
            "Give --calib and --eval of shapes that it takes, or --batch-size 1 if it takes only "
            "one sample at a time."
        )
        raise ModelError(error.message, hint=hint) from error


def _like_an_input(output: TensorSpec, inputs: Sequence[TensorSpec]) -> bool:
    """Whether an output has the shape of an input, past the batch axis."""
    shape = output.shape
    return shape is not None and any(i.shape and i.shape[1:] == shape[1:] for i in inputs)


def _conclude(
    samples: int, outputs: dict[str, OutputMeter], classes: dict[str, ClassMeter]
) -> Comparison:
    fidelities = tuple(meter.finish() for meter in outputs.values())
    accuracies = [found for meter in classes.values() if (found := meter.accuracy()) is not None]
    agreements = [made for meter in classes.values() if (made := meter.agreement()) is not None]
    fatal = tuple(
        f"output '{o.name}' has {o.nonfinite_result} NaN or infinite values where the original's "
        "are finite"
        for o in fidelities
        if o.nonfinite_result
    )
    return Comparison(
        samples=samples,
        outputs=fidelities,
        agreements=tuple(agreements),
        accuracy=accuracies[0] if accuracies else None,
        fatal=fatal,
    )
