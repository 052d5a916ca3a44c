"""Invented samples, for models that come without data.

They only make a model run: element types, shapes and the ranges of indices are right, the content
is noise. Ranges and moments measured on them say little about real inputs, so every report names
them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcompress.calibration.arrays import Array
from onnxcompress.calibration.checks import Layout
from onnxcompress.calibration.dataset import Dataset
from onnxcompress.errors import DataError, ModelError
from onnxcompress.graph.constants import constant_of
from onnxcompress.interface import TensorSpec, input_specs
from onnxcompress.runtime import Session, SessionSettings, open_session

# Lengths tried for dynamic axes, in pairs: of the two last axes of images, and of all others.
_LENGTHS = ((224, 32), (256, 64), (128, 128), (64, 16), (320, 8), (32, 1), (640, 256), (512, 512))

# Operators whose output holds values of their first input, so that a bound on one is one on both.
_MOVES = frozenset(
    {
        "Cast",
        "Concat",
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Pad",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to invent one input.

    Attributes:
        spec: The input.
        shape: Of one sample, without the batch axis where samples are batch first.
        kind: "normal" (mean 0, variance 1), "uniform" (0 to 1), "integers" (below ``bound``),
            "positions" (0, 1, 2, ... below ``bound``) or "constant" (``bound``).
        bound: See ``kind``.
    """

    spec: TensorSpec
    shape: tuple[int, ...]
    kind: str
    bound: int = 2

    def make(self, random: np.random.Generator) -> Array:
        """One sample."""
        made: Array
        if self.kind == "normal":
            made = random.standard_normal(self.shape, dtype=np.float32)
        elif self.kind == "uniform":
            made = random.random(self.shape, dtype=np.float32)
        elif self.kind == "integers":
            made = random.integers(0, self.bound, self.shape)
        elif self.kind == "positions":
            length = self.shape[-1] if self.shape else 1
            made = np.broadcast_to(np.arange(length) % self.bound, self.shape)
        else:
            made = np.full(self.shape, self.bound)
        return np.asarray(made).astype(self.spec.dtype)

    def __str__(self) -> str:
        words = {
            "normal": "normal noise",
            "uniform": "noise of 0 to 1",
            "integers": f"integers below {self.bound}",
            "positions": "positions",
            "constant": f"all {self.bound}",
        }
        return f"'{self.spec.name}' {words[self.kind]} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class SyntheticSource:
    """Samples made when they are needed, each from its own seed.

    Attributes:
        recipes: One per input.
        sample_count: Number of samples.
        seed: Seed of all.
        layout: See :class:`onnxcompress.calibration.dataset.Source`.
    """

    recipes: tuple[Recipe, ...]
    sample_count: int
    seed: int
    layout: Layout

    def pieces(self, start: int, stop: int, size: int) -> Iterator[dict[str, Array]]:
        """See :class:`onnxcompress.calibration.dataset.Source`."""
        for low in range(start, stop, size):
            samples = [self._sample(i) for i in range(low, min(low + size, stop))]
            yield {
                recipe.spec.name: np.stack([sample[recipe.spec.name] for sample in samples])
                for recipe in self.recipes
            }

    def _sample(self, index: int) -> dict[str, Array]:
        random = np.random.default_rng((self.seed, index))
        return {recipe.spec.name: recipe.make(random) for recipe in self.recipes}


def synthetic_dataset(model: ir.Model, *, samples: int, seed: int) -> Dataset:
    """Invent samples on which the model runs and gives finite outputs.

    Indices stay within the tables they look up, masks are ones, dynamic axes get lengths at which
    the model runs (found by trying).

    Args:
        model: The model.
        samples: How many; a fixed batch axis rounds it up to whole batches.
        seed: Seed of the noise.

    Raises:
        DataError: If no samples were found on which the model runs.
        ModelError: If the model does not load.
    """
    specs = input_specs(model)
    if not specs:
        raise DataError("the model has no inputs, so there is nothing to invent")
    texts = [spec.name for spec in specs if spec.dtype == np.dtype(object)]
    if texts:
        raise DataError(
            f"strings for input '{texts[0]}' cannot be invented",
            hint="Give real samples with --calib.",
        )
    layout = _layout(specs)
    group = layout.group or 1
    count = max(1, -(-samples // group)) * group
    values = {value.name: value for value in model.graph.inputs}
    found = {spec.name: _values_for(values[spec.name], spec) for spec in specs}
    session = open_session(model, SessionSettings())
    problem = ""
    for attempt in _attempts(specs, found, layout):
        source = SyntheticSource(attempt, count, seed, layout)
        described = "synthetic samples: " + ", ".join(map(str, attempt))
        dataset = Dataset(source, specs, described, synthetic=True)
        problem = _trial(session, dataset)
        if not problem:
            return dataset
    raise DataError(
        f"no synthetic samples were found on which the model runs: {problem}",
        hint="Give real samples with --calib.",
    )


def _layout(specs: Sequence[TensorSpec]) -> Layout:
    batches = {spec.shape[0] for spec in specs if spec.shape and spec.batch is None} - {""}
    if any(batches & set(spec.shape[1:]) for spec in specs if spec.shape):
        # Its length is one number in several places, which stacked samples would not keep.
        return Layout(frozenset(spec.name for spec in specs), 1)
    if all(spec.shape and spec.batch is None for spec in specs):
        return Layout()
    groups = {spec.batch for spec in specs}
    if len(groups) == 1 and None not in groups:
        return Layout(group=groups.pop())
    return Layout(frozenset(spec.name for spec in specs), 1)


def _trial(session: Session, dataset: Dataset) -> str:
    """Run one sample; why it did not work, "" when it did."""
    try:
        outputs = session.run(dataset.first())
    except ModelError as error:
        return error.message
    for name, array in outputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return f"output '{name}' is not finite"
    return ""


def _attempts(
    specs: Sequence[TensorSpec], found: Mapping[str, tuple[str, int]], layout: Layout
) -> Iterator[tuple[Recipe, ...]]:
    """Ways to fill all inputs, the most natural first."""
    dynamic = any(not isinstance(d, int) for s in specs for d in (s.shape or ())[1:])
    lengths = _LENGTHS if dynamic else _LENGTHS[:1]
    ways: list[Mapping[str, tuple[str, int]]] = [found]
    if any(kind == "normal" for kind, _ in found.values()):
        # A model that takes logarithms or roots wants positive inputs.
        ways.append({n: ("uniform", b) if k == "normal" else (k, b) for n, (k, b) in found.items()})
    if any(kind == "integers" for kind, _ in found.values()):
        ways.append({n: (k, 2 if k == "integers" else b) for n, (k, b) in found.items()})
    batches = {s.shape[0] for s in specs if s.shape and isinstance(s.shape[0], str)} - {""}
    for way, (side, length) in itertools.product(ways, lengths):
        yield tuple(
            Recipe(
                spec,
                _shape(spec, side, length, batches, spec.name in layout.whole),
                *way[spec.name],
            )
            for spec in specs
        )


def _shape(
    spec: TensorSpec, side: int, length: int, batches: Set[int | str], whole: bool
) -> tuple[int, ...]:
    """The shape of one sample, dynamic axes filled in; ``batches`` are names of batch axes."""
    shape = spec.shape or ()
    # The state of a recurrent network is [layers, batch, hidden].
    state = len(shape) == 3 and isinstance(shape[0], int) and isinstance(shape[2], int)
    out = []
    for axis, entry in enumerate(shape):
        if isinstance(entry, int):
            out.append(entry)
        elif axis == 0 or entry in batches or (state and axis == 1):
            out.append(1)
        elif len(shape) < 4:
            out.append(length)
        elif len(shape) == 4 and axis == (3 if shape[1:3] == ("", "") or shape[3] in (1, 3) else 1):
            out.append(3)
        else:
            out.append(side)
    return tuple(out if whole else out[1:])


def _values_for(value: ir.Value, spec: TensorSpec) -> tuple[str, int]:
    """Kind and bound of the values of an input, from what the model does with it."""
    name = spec.name.lower()
    if spec.dtype.kind not in "iub":
        return ("constant", 1) if "mask" in name else ("normal", 0)
    if "mask" in name or "length" in name:
        return ("constant", 1)
    limits, equals, becomes_float = _uses(value)
    if spec.dtype.kind == "b":
        return ("constant", 1)
    if limits:
        bound = min(limits)
        if "token_type" in name or "segment" in name:
            return ("constant", 0)
        return ("positions" if "position" in name else "integers", bound)
    if equals:
        return ("constant", max(equals))
    if spec.dtype == np.uint8:
        return ("integers", 256)
    if becomes_float and spec.dtype.itemsize >= 4:
        return ("constant", 1)
    return ("integers", 2)


def _uses(value: ir.Value) -> tuple[set[int], set[int], bool]:
    """Follow integers through data movement.

    Returns:
        The lengths of the tables they index, the constants they are compared with, and whether they
        become floating point.
    """
    limits: set[int] = set()
    equals: set[int] = set()
    becomes_float = False
    seen, todo = {value}, [value]
    while todo:
        current = todo.pop()
        for node, index in current.uses():
            if index == 1 and node.op_type in {"Gather", "GatherElements"}:
                axis = node.attributes.get_int("axis", 0)
                limits |= _lengths(node.inputs[0], axis)
            elif index == 0 and node.op_type == "OneHot":
                depth = constant_of(node.inputs[1])
                limits |= set() if depth is None else {int(depth.ravel()[0])}
            elif node.op_type == "Equal":
                other = constant_of(node.inputs[1 - index])
                if other is None or not other.size or other.dtype.kind not in "iu":
                    continue
                if other.size == 1:
                    equals.add(int(other.ravel()[0]))
                else:
                    limits.add(int(other.max()) + 1)  # a one-hot encoding against 0, 1, 2, ...
            elif node.op_type in _MOVES and (index == 0 or node.op_type == "Concat"):
                if node.op_type == "Cast" and _to_floating(node):
                    becomes_float = True
                fresh = [output for output in node.outputs if output not in seen]
                seen.update(fresh)
                todo.extend(fresh)
    return limits, equals, becomes_float


def _lengths(table: ir.Value | None, axis: int) -> set[int]:
    if table is None or table.shape is None or not -len(table.shape) <= axis < len(table.shape):
        return set()
    length = table.shape[axis]
    return {length} if isinstance(length, int) else set()


def _to_floating(cast: ir.Node) -> bool:
    target = cast.attributes.get_int("to", int(ir.DataType.UNDEFINED))
    return ir.DataType(target).is_floating_point()
