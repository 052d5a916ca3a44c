"""New weights for recurrent layers: their gates are linear before the activation.

The pre-activations of a recurrent layer at one step are

    a_t = W x_t + R h_(t-1) + b

With ``x`` and ``h`` recorded from the original they are known, though no value of the graph holds
them. They are fitted anew for the cells that stay, from the inputs that stay, as they come out of
the network compressed so far, and the cells that stay:

    W', R', b' = argmin E‖a_t - W' x̂_t - R' h_(t-1) - b'‖² + ρ‖(W', R') - (W, R)‖²

The cells are the original's, not those of the smaller layer: these follow from the weights that are
sought, and where the fit is exact they are the original's (teacher forcing, Williams and Zipser
1989).

The gates of LSTM and RNN are treated so. One gate of GRU reads products of cells with another gate;
refitting only the two others made outputs worse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.calibration.statistics import REFERENCE_PREFIX
from onnxcompress.graph.constants import constant_of, constant_tensor, set_initializer
from onnxcompress.graph.coupling import Coupling
from onnxcompress.numerics.least_squares import Moments, regress
from onnxcompress.passes.prune.consumers import UnsupportedError
from onnxcompress.passes.prune.score import staying
from onnxcompress.passes.prune.stream import Stream

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

Choice: TypeAlias = Callable[[Sequence[Moments], Array, Array], float | None]

GATES: Mapping[str, int] = {"RNN": 1, "LSTM": 4}
"""Gates of the operators that are refitted."""
_ROWS = 32768
"""Rows to take at most."""


@dataclass(frozen=True, slots=True)
class Steps:
    """Names of the values that hold what a layer reads at each step.

    Attributes:
        data: ``X``, [T, B, I].
        initial: The cells before the first step, [D, B, H]; "" for zeros.
        cells: The cells after each step, [T, D, B, H]; "" where no value holds them, as is fine
            for a single step.
    """

    data: str
    initial: str
    cells: str

    @property
    def names(self) -> tuple[str, ...]:
        """Those that exist."""
        return tuple(n for n in (self.data, self.initial, self.cells) if n)

    def renamed(self, names: Mapping[str, str]) -> Steps:
        """The same in a graph where values have other names."""
        return Steps(*(names.get(n, n) for n in (self.data, self.initial, self.cells)))


@dataclass(frozen=True, slots=True)
class Recurrent:
    """One recurrent layer.

    Attributes:
        node: Node name.
        op_type: Its operator.
        weights: Initializers of ``W`` [D, gH, I], ``R`` [D, gH, H] and, if there is one, ``B``.
        width: ``I``.
        hidden: ``H``.
        backward: Of each direction, whether it runs from the last step to the first.
        data: Name of its input in the masked model.
        before: What it reads in the original.
    """

    node: str
    op_type: str
    weights: tuple[str, ...]
    width: int
    hidden: int
    backward: tuple[bool, ...]
    data: str
    before: Steps

    @property
    def written(self) -> tuple[str, ...]:
        """Initializers that get new values."""
        return self.weights

    @property
    def wanted(self) -> tuple[str, ...]:
        """Values to have at hand."""
        return (self.data, *self.before.names)

    def kept(self, coupling: Coupling, units: Mask) -> tuple[Mask, Mask]:
        """Which inputs [I] and which cells [H] stay.

        Args:
            coupling: The groups.
            units: Which units stay, as :meth:`Coupling.kept`.
        """
        return (
            staying(coupling, units, self.weights[0], 2, self.width),
            staying(coupling, units, self.weights[1], 2, self.hidden),
        )

    def refit(
        self,
        models: Iterable[ir.Model],
        original: ir.Model,
        stream: Stream,
        names: Mapping[str, str],
        kept: tuple[Mask, Mask],
        folds: int,
        choose: Choice,
    ) -> float | None:
        """Write new weights into ``models``.

        Args:
            models: Those to change; all hold the same old weights.
            original: Holds the original weights.
            stream: Holds the values.
            names: What values of the original are called there.
            kept: Which inputs [I] and which cells [H] stay.
            folds: Parts the samples are divided into.
            choose: Gives the ridge from the moments of each fold, the old weights and bias;
                infinite for a new bias alone, None for no change.

        Returns:
            The largest ridge of any direction; infinite where only a bias changed, None where
            nothing did.
        """
        targets = list(models)
        inputs, cells = kept
        gates = GATES[self.op_type]
        rows = np.concatenate([g * self.hidden + np.flatnonzero(cells) for g in range(gates)])
        old = [_array(targets[0], name) for name in self.weights]
        new = [a.copy() for a in old]
        chosen: list[float] = []
        for d, backward in enumerate(self.backward):
            first = [_array(original, name)[d] for name in self.weights]
            moments = self._moments(stream, names, folds, d, backward, first, kept, rows)
            prior = np.hstack([old[0][d][np.ix_(rows, inputs)], old[1][d][np.ix_(rows, cells)]])
            bias = np.zeros(len(rows))
            recurrent_bias = gates * self.hidden + rows
            if len(old) > 2:
                bias = old[2][d][rows] + old[2][d][recurrent_bias]
            else:
                moments = [m.uncentred() for m in moments]
            found = choose(moments, prior, bias) if moments else None
            if found is None:
                continue
            chosen.append(found)
            whole = _sum(moments)
            fitted = regress(whole, prior, found)[0] if np.isfinite(found) else prior
            width = int(np.count_nonzero(inputs))
            new[0][d][np.ix_(rows, inputs)] = fitted[:, :width]
            new[1][d][np.ix_(rows, cells)] = fitted[:, width:]
            if len(old) > 2:
                total = whole.mean_y - fitted @ whole.mean_x
                new[2][d][rows] = total - old[2][d][recurrent_bias]
        if not chosen:
            return None
        for model in targets:
            for name, array in zip(self.weights, new, strict=True):
                stored = constant_of(model.graph.initializers[name])
                dtype = np.dtype(np.float32) if stored is None else stored.dtype
                set_initializer(model.graph, name, array.astype(dtype))
        return max(chosen)

    def _moments(
        self,
        stream: Stream,
        names: Mapping[str, str],
        folds: int,
        direction: int,
        backward: bool,
        original: list[Array],
        kept: tuple[Mask, Mask],
        rows: npt.NDArray[np.int64],
    ) -> list[Moments]:
        """Moments of (inputs and cells now, original pre-activations) of each fold."""
        inputs, cells = kept
        weight = np.hstack([original[0][rows], original[1][rows]])
        bias = np.zeros(len(rows))
        if len(original) > 2:
            second = len(original[2]) // 2
            bias = original[2][rows] + original[2][second + rows]
        before = self.before.renamed(names)
        parts: dict[int, Moments] = {}
        limit = max(_ROWS // max(stream.run_count, 1), 1)
        wanted = list(dict.fromkeys((self.data, *before.names)))
        for number, (_, found) in enumerate(stream.feeds(wanted)):
            then = _rows(found, before, direction, backward, self.hidden)
            data = found[self.data].reshape(len(then), -1)
            now = np.hstack([data, then[:, self.width :]])
            if len(now) > limit:
                taken = np.arange(limit) * len(now) // limit
                now, then = now[taken], then[taken]
            x = now[:, np.concatenate([inputs, cells])]
            made = _moments_of(x, then @ weight.T + bias)
            fold = number * folds // stream.run_count
            parts[fold] = parts[fold].merge(made) if fold in parts else made
        return [parts[fold] for fold in sorted(parts)]


def recurrent_of(node: ir.Node, masked: ir.Node) -> Recurrent:
    """Read a node as a recurrent layer.

    Args:
        node: The node of the original.
        masked: The same node of the masked model.

    Raises:
        UnsupportedError: With the reason, if it is none or cannot be refitted.
    """
    if node.op_type not in GATES or node.domain not in {"", "ai.onnx"}:
        raise UnsupportedError(f"{node.op_type} is not a recurrent layer")
    layout = node.attributes.get("layout")
    if layout is not None and layout.as_int():
        raise UnsupportedError("its batch comes first (layout=1)")
    if len(node.inputs) > 4 and node.inputs[4] is not None:
        raise UnsupportedError("its sequences have lengths of their own")
    weights = []
    for value in [*node.inputs[1:3], *(v for v in node.inputs[3:4] if v is not None)]:
        tensor = constant_tensor(value)
        if value is None or tensor is None or not value.is_initializer():
            raise UnsupportedError("its weights are computed, not stored")
        if not tensor.dtype.is_floating_point():
            raise UnsupportedError(f"its weights are of type {tensor.dtype.name}")
        if len(list(value.uses())) > 1:
            raise UnsupportedError("its weights are shared with another node")
        weights.append((value.name or "", tuple(int(n) for n in tensor.shape.numpy())))
    direction = node.attributes.get("direction")
    kind = "forward" if direction is None else direction.as_string()
    backward = {"forward": (False,), "reverse": (True,)}.get(kind, (False, True))
    before, data = _steps(node), masked.inputs[0]
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if not before.cells and (shape is None or shape[0] != 1):
        raise UnsupportedError("its cells at single steps are no value of the graph")
    return Recurrent(
        node=node.name or "",
        op_type=node.op_type,
        weights=tuple(name for name, _ in weights),
        width=weights[0][1][2],
        hidden=weights[1][1][2],
        backward=backward,
        data="" if data is None else data.name or "",
        before=before,
    )


def _steps(node: ir.Node) -> Steps:
    data, cells = node.inputs[0], node.outputs[0]
    initial = node.inputs[5] if len(node.inputs) > 5 else None
    if data is None or data.is_initializer():
        raise UnsupportedError("its input is a constant")
    if initial is not None and constant_tensor(initial) is not None:
        raise UnsupportedError("its initial cells are a constant")
    return Steps(
        f"{REFERENCE_PREFIX}{data.name}",
        "" if initial is None else f"{REFERENCE_PREFIX}{initial.name}",
        f"{REFERENCE_PREFIX}{cells.name}" if cells.name else "",
    )


def _rows(
    found: Mapping[str, npt.NDArray[np.generic]],
    steps: Steps,
    direction: int,
    backward: bool,
    hidden: int,
) -> Array:
    """Inputs and previous cells of all steps, [T · B, I + H]."""
    data = found[steps.data].astype(np.float64)
    length, batch, _ = data.shape
    previous = np.zeros((length, batch, hidden))
    if length > 1:
        cells = found[steps.cells][:, direction].astype(np.float64)
        if backward:
            previous[:-1] = cells[1:]
        else:
            previous[1:] = cells[:-1]
    if steps.initial:
        previous[-1 if backward else 0] = found[steps.initial][direction]
    return np.concatenate([data, previous], axis=2).reshape(length * batch, -1)


def _moments_of(x: Array, y: Array) -> Moments:
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    centred = x - mean_x
    return Moments(
        count=len(x),
        mean_x=mean_x,
        mean_y=mean_y,
        covariance=centred.T @ centred / len(x),
        cross=centred.T @ (y - mean_y) / len(x),
    )


def _sum(parts: list[Moments]) -> Moments:
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return total


def _array(model: ir.Model, name: str) -> Array:
    found = constant_of(model.graph.initializers[name])
    if found is None:
        raise UnsupportedError(f"'{name}' is not stored")
    return found.astype(np.float64)
