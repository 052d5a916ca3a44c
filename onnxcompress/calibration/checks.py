"""Whether arrays fit a model's inputs, and what to do about it when they do not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcompress.calibration.arrays import Array, LazyArray
from onnxcompress.errors import DataError
from onnxcompress.interface import TensorSpec

LABELS = "labels"
"""Name of the optional array of class numbers in a .npz file or a mapping."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How samples lie in arrays whose first axis counts samples.

    Attributes:
        whole: Inputs whose array has one axis more than the input: row ``i`` is the whole input of
            sample ``i``. The others are batch first.
        group: Samples per run when the model fixes it (its fixed batch axis, or 1 as soon as one
            input is whole); None when any number goes.
    """

    whole: frozenset[str] = frozenset()
    group: int | None = None


def match_names(names: Sequence[str], specs: Sequence[TensorSpec], label: str) -> dict[str, str]:
    """Which array feeds which input.

    One array for a model of one input matches under any name.

    Returns:
        Input name to array name.

    Raises:
        DataError: If an input has no array, or an array is no input.
    """
    wanted = [spec.name for spec in specs]
    if len(wanted) == 1 and len(names) == 1:
        return {wanted[0]: names[0]}
    missing = [name for name in wanted if name not in names]
    extra = [name for name in names if name not in wanted]
    if not missing and not extra:
        return {name: name for name in wanted}
    parts = []
    if missing:
        parts.append(f"no array for {_listed(missing)}")
    if extra:
        parts.append(f"{_listed(extra)} {'is' if len(extra) == 1 else 'are'} no input of the model")
    close = [
        f"'{name}' instead of '{near[0]}'?"
        for name in extra
        if (near := difflib.get_close_matches(name, [*missing, LABELS], 1, 0.5))
    ]
    hint = f"The model's inputs are {_listed(wanted)}; name the arrays after them."
    if close:
        hint = f"Did you write {' '.join(close)} {hint}"
    raise DataError(f"{label}: {'; '.join(parts)}", hint=hint)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def layout_of(
    arrays: Mapping[str, LazyArray], specs: Sequence[TensorSpec], label: str
) -> tuple[Layout, int]:
    """How the samples lie, and how many there are.

    Args:
        arrays: One array per input, by input name.
        specs: The model's inputs.
        label: What to call the data in messages.

    Raises:
        DataError: If shapes do not fit, sample counts differ or there is no sample.
    """
    whole = frozenset(s.name for s in specs if _is_whole(s, arrays[s.name], label))
    for spec in specs:
        _check_shape(spec, arrays[spec.name].shape, spec.name in whole, label)
    counts = {spec.name: arrays[spec.name].shape[0] for spec in specs}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"'{name}': {count}" for name, count in counts.items())
        raise DataError(
            f"{label}: the inputs have different numbers of samples ({listed})",
            hint="The first axis of every array counts the samples.",
        )
    count = next(iter(counts.values()))
    group = fixed_group([s for s in specs if s.name not in whole], label)
    if whole:
        if group is not None and group > 1:
            raise DataError(
                f"{label}: {_listed(sorted(whole))} hold one whole input per sample, but the model "
                f"takes {group} samples at once in the others",
                hint="Give all inputs whole, one per sample, with one axis more than the input.",
            )
        group = 1
    if count < (group or 1):
        what = "no samples" if count == 0 else f"only {count} samples"
        raise DataError(
            f"{label}: {what}; the model takes at least {group or 1} per run",
            hint="Give more samples.",
        )
    return Layout(whole, group), count


def fixed_group(specs: Sequence[TensorSpec], label: str) -> int | None:
    """The fixed batch length that batch-first inputs agree on; None when all are dynamic.

    Raises:
        DataError: If they fix different lengths.
    """
    fixed = {spec.name: spec.batch for spec in specs if spec.batch is not None}
    if len(set(fixed.values())) > 1:
        listed = ", ".join(f"'{name}': {length}" for name, length in fixed.items())
        raise DataError(
            f"{label}: the first axes of the model's inputs have different fixed lengths "
            f"({listed}), so samples cannot be counted along them",
            hint="Give one whole input per sample: stack them, with one axis more than the input.",
        )
    return next(iter(fixed.values()), None)


def _is_whole(spec: TensorSpec, array: LazyArray, label: str) -> bool:
    rank = len(array.shape)
    if spec.rank is None:
        return False
    if rank == spec.rank + 1:
        return True
    if rank == spec.rank and rank > 0:
        return False
    wanted = f"{spec.rank} axes (batch first) or {spec.rank + 1} (one whole input per sample)"
    if spec.rank == 0:
        wanted = "1 axis (one scalar per sample)"
    raise DataError(
        f"{label}: array for input '{spec}' has {rank} axes {list(array.shape)}; it needs {wanted}",
        hint="Add or remove an axis (numpy.expand_dims, numpy.squeeze).",
    )


def _check_shape(spec: TensorSpec, shape: tuple[int, ...], whole: bool, label: str) -> None:
    """Compare the axes after the sample axis with the input's fixed ones."""
    if spec.shape is None:
        return
    wanted = spec.shape if whole else spec.shape[1:]
    seen = shape[1:]
    if any(isinstance(w, int) and w != s for w, s in zip(wanted, seen, strict=True)):
        hint = f"Every sample must have the shape {[d or '?' for d in wanted]}."
        if sorted(map(str, wanted)) == sorted(map(str, seen)) and len(seen) == 3:
            hint += " The axes look transposed (channels first or last)."
        raise DataError(
            f"{label}: samples of shape {list(seen)} do not fit input '{spec}'", hint=hint
        )
    if 0 in seen:
        raise DataError(
            f"{label}: array for input '{spec}' has an empty axis {list(shape)}",
            hint="Every axis needs at least one element.",
        )


def check_dtype(spec: TensorSpec, dtype: np.dtype[np.generic], label: str) -> None:
    """Whether an array type can feed an input without losing values.

    Floating-point numbers may change their width, integers and booleans may become floating point
    where every value of the type survives. Integers may change their width, which
    :func:`converted` then checks value by value.

    Raises:
        DataError: If it cannot.
    """
    source, target = _kind(dtype), _kind(spec.dtype)
    fine = (
        dtype == spec.dtype
        or (source == target)
        or (source == "bool" and target in {"int", "float"})
        or (source == "int" and target == "float" and _survives(dtype, spec.dtype))
    )
    if fine:
        return
    hint = f"Convert it: array.astype('{spec.dtype}')."
    if source == "int" and target == "float":
        hint = f"Not every {dtype} is a {spec.dtype}. {hint}"
    if source == "float" and target == "int":
        hint = f"Fractions would be lost. {hint}"
    raise DataError(f"{label}: {dtype} array for input '{spec}'", hint=hint)


def _survives(source: np.dtype[np.generic], target: np.dtype[np.generic]) -> bool:
    return target.kind == "f" and bool(np.can_cast(source, target, "safe"))


def _kind(dtype: np.dtype[np.generic]) -> str:
    if dtype.kind in "OUST":
        return "string"
    names = {"b": "bool", "i": "int", "u": "int", "f": "float", "c": "complex"}
    if dtype.kind in names:
        return names[dtype.kind]
    # bfloat16 and the 8-bit floats are numpy extension types of kind "V".
    return "float" if "float" in dtype.name else dtype.name


def converted(spec: TensorSpec, array: Array, first_sample: int, label: str) -> Array:
    """An array as the input's type, contiguous, after checking its values.

    Args:
        spec: The input.
        array: Samples on the first axis, of a type that :func:`check_dtype` accepts.
        first_sample: Number of the first sample, for messages.
        label: What to call the data in messages.

    Raises:
        DataError: If a value is NaN, infinite or does not fit the type.
    """
    with np.errstate(over="ignore"):
        out = np.ascontiguousarray(array, dtype=spec.dtype).reshape(array.shape)
    if _kind(spec.dtype) == "float":
        # A sum is not finite as soon as one element is not; it may overflow, so it only acquits.
        with np.errstate(over="ignore", invalid="ignore"):
            acquitted = out.dtype.kind == "f" and bool(np.isfinite(out.sum(dtype=np.float64)))
        if not acquitted and not (ok := np.isfinite(out.astype(np.float64))).all():
            sample = first_sample + int(np.argmin(ok.reshape(len(ok), -1).all(axis=1)))
            raise DataError(
                f"{label}: sample {sample} of input '{spec}' has NaN or infinite values"
                + ("" if array.dtype == out.dtype else f" as {out.dtype}"),
                hint="Remove or repair the sample.",
            )
    elif out.dtype != array.dtype and _kind(spec.dtype) == "int" and not np.array_equal(out, array):
        bounds = np.iinfo(out.dtype)
        raise DataError(
            f"{label}: values of the {array.dtype} array do not fit input '{spec}'",
            hint=f"The type {spec.dtype} holds {bounds.min} to {bounds.max}.",
        )
    return out
