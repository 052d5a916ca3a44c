"""Write a chain into a graph in the place of its layer.

    Conv            Conv [r, C, k..], Conv 1x1                    output form
                    Conv 1x1, Conv [O, r, k..]                    input form
                    Conv [r, C, h, 1], Conv [O, r, 1, w]          spatial form
                    Conv 1x1, Conv [r, s, k..], Conv 1x1          Tucker form
    Gemm            MatMul [D, r], Gemm [O, r] with the bias
    MatMul          MatMul [.., D, r], MatMul [.., r, O]; a constant on the left: [r, D], [O, r]
    LSTM, GRU, RNN  MatMul [I, r], then the operator with input weights [.., r]
    Gather          Gather from [V, r], MatMul [r, E]
    ConvTranspose   Conv 1x1, ConvTranspose [r, O, k..]

The last node carries the bias and takes over the output's name, type and uses. Padding belongs to
the node that has the taps: a 1x1 convolution without bias maps padding of zeros to zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.constants import constant_tensor, set_initializer
from onnxcompress.graph.naming import Namer
from onnxcompress.numerics.low_rank import Chain, Form
from onnxcompress.passes.svd.sites import Kind, Site

Array = npt.NDArray[np.float64]
_Attributes = dict[str, int | float | str | Sequence[int]]


@dataclass(frozen=True, slots=True)
class Written:
    """A chain in a graph.

    Attributes:
        site: The layer it stands for.
        form: Which chain.
        ranks: Its ranks.
        factors: Names of the initializers, first applied first.
        last: Name of the node that makes the output.
        bias: Initializer that takes up means; None where there is none.
    """

    site: Site
    form: Form
    ranks: tuple[int, ...]
    factors: tuple[str, ...]
    last: str
    bias: str | None

    def store(self, model: ir.Model, chains: Sequence[Chain], bias: Array | None) -> None:
        """Give the factors, and the bias if there is one, new values."""
        for name, array in zip(self.factors, stored_factors(self.site, chains), strict=True):
            _store(model, name, array)
        if self.bias is not None and bias is not None:
            store_bias(model, self.bias, bias)


def store_bias(model: ir.Model, name: str, bias: Array) -> None:
    """Write ``bias`` [O] in the shape that the initializer has."""
    old = constant_tensor(model.graph.initializers[name])
    rank = 1 if old is None else len(old.shape)
    _store(model, name, bias.reshape((1,) * (rank - 1) + (-1,)))


def bias_vector(model: ir.Model, name: str | None, outputs: int) -> Array:
    """The bias ``name`` as [O], float64; zeros for None."""
    tensor = None if name is None else constant_tensor(model.graph.initializers[name])
    if tensor is None:
        return np.zeros(outputs)
    stored = np.asarray(tensor.numpy()).astype(np.float64)
    return np.broadcast_to(stored.reshape(-1), (outputs,)).copy()


def stored_factors(site: Site, chains: Sequence[Chain]) -> list[Array]:
    """The factors of the chains (one per batch entry) as they lie in the file."""
    factors = chains[0].factors
    match site.kind:
        case Kind.CONV:
            return _conv_factors(site, chains[0])
        case Kind.LEFT:
            return list(factors)
        case Kind.BATCHED:
            stacks = [np.stack([c.factors[i].T for c in chains]) for i in range(2)]
            return [s.reshape(*site.shape[:-2], *s.shape[-2:]) for s in stacks]
        case Kind.RECURRENT:
            return [factors[0].T, factors[1].reshape(*site.shape[:2], -1)]
        case Kind.TRANSPOSED:
            first = factors[0].reshape(*factors[0].shape, *_ones(site))
            return [first, factors[1].T.reshape(-1, *site.shape[1:])]
        case _:
            return [f.T for f in factors]


def _conv_factors(site: Site, chain: Chain) -> list[Array]:
    taps, channels, ones = site.kernel.taps, site.kernel.channels, _ones(site)
    first, *rest = chain.factors
    match chain.form:
        case Form.OUTPUT:
            shapes = [(-1, channels, *taps), (*rest[0].shape, *ones)]
        case Form.SPATIAL:
            shapes = [(-1, channels, taps[0], 1), (len(rest[0]), len(first), 1, taps[1])]
        case _:
            shapes = [(*first.shape, *ones), (len(rest[0]), len(first), *taps)]
            if len(rest) > 1:
                shapes.append((*rest[1].shape, *ones))
    return [f.reshape(s) for f, s in zip(chain.factors, shapes, strict=True)]


def _ones(site: Site) -> tuple[int, ...]:
    return (1,) * (len(site.shape) - 2)


class Writer:
    """Puts chains into one model.

    Args:
        model: The model to change.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model, self._namer = model, Namer(model)
        self._nodes = {n.name or "": n for n in model.graph}

    def write(self, site: Site, chains: Sequence[Chain], bias: Array | None = None) -> Written:
        """Replace the layer of ``site``.

        Args:
            site: The layer.
            chains: Its factors, one chain per batch entry.
            bias: New bias [O]; one is added where there is none. None leaves it as it is.
        """
        node = self._nodes[site.node]
        old = constant_tensor(self._model.graph.initializers[site.weight])
        dtype = np.dtype(np.float32) if old is None else old.numpy().dtype
        arrays = stored_factors(site, chains)
        roles = ["first", "last"] if len(arrays) == 2 else ["first", "core", "last"]
        factors = [
            self._constant(f"{site.weight}/svd_{role}", array.astype(dtype))
            for role, array in zip(roles, arrays, strict=True)
        ]
        bias_name = self._bias(site, node, bias, dtype)
        form = chains[0].form
        if site.kind is Kind.RECURRENT:
            last = self._before_recurrent(node, factors)
        else:
            last = self._replace(site, node, form, factors)
        stale = self._model.graph.initializers[site.weight]
        if not stale.uses() and not stale.is_graph_output():
            self._model.graph.initializers.pop(site.weight)
        names = tuple(f.name or "" for f in factors)
        return Written(site, form, chains[0].ranks, names, last.name or "", bias_name)

    def _bias(
        self, site: Site, node: ir.Node, bias: Array | None, dtype: np.dtype[np.generic]
    ) -> str | None:
        """Write the bias, adding one if need be; its name."""
        if bias is None or not site.takes_bias:
            return site.bias
        if site.bias is not None:
            store_bias(self._model, site.bias, bias)
            return site.bias
        value = self._constant(f"{site.node}/svd_bias", bias.astype(dtype))
        node.resize_inputs(3)
        node.replace_input_with(2, value)
        return value.name

    def _before_recurrent(self, node: ir.Node, factors: Sequence[ir.Value]) -> ir.Node:
        data = node.inputs[0]
        product = self._node(node, "first", "MatMul", [data, factors[0]], {})
        _insert(node, product)
        self._name_output(node, "first", product)
        node.replace_input_with(0, product.outputs[0])
        node.replace_input_with(1, factors[1])
        return node

    def _replace(
        self, site: Site, node: ir.Node, form: Form, factors: Sequence[ir.Value]
    ) -> ir.Node:
        steps = _steps(site, node, form)
        bias = node.inputs[2] if site.kind in _WITH_BIAS and len(node.inputs) > 2 else None
        value = node.inputs[1 if site.kind in {Kind.LEFT, Kind.EMBEDDING} else 0]
        roles = ["first", "last"] if len(steps) == 2 else ["first", "core", "last"]
        made: ir.Node | None = None
        for number, (role, (op_type, attributes)) in enumerate(zip(roles, steps, strict=True)):
            inputs = [value, factors[number]]
            if site.kind is Kind.LEFT or op_type == "Gather":
                inputs.reverse()
            final = number == len(steps) - 1
            if final and bias is not None:
                inputs.append(bias)
            made = self._node(node, role, op_type, inputs, attributes)
            _insert(node, made)
            if not final:
                self._name_output(node, role, made)
            value = made.outputs[0]
        if made is None:
            raise AssertionError  # a chain has at least two steps
        _take_over(node, made)
        return made

    def _constant(self, wanted: str, array: npt.NDArray[np.generic]) -> ir.Value:
        name = self._namer.value(wanted)
        return set_initializer(self._model.graph, name, np.ascontiguousarray(array))

    def _node(
        self,
        node: ir.Node,
        role: str,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: _Attributes,
    ) -> ir.Node:
        name = self._namer.node(f"{node.name}/svd_{role}")
        return ir.node(op_type, inputs, attributes or None, domain=node.domain, name=name)

    def _name_output(self, node: ir.Node, role: str, made: ir.Node) -> None:
        output = made.outputs[0]
        output.name = self._namer.value(f"{node.outputs[0].name}/svd_{role}")
        if node.outputs[0].dtype is not None:
            output.type = ir.TensorType(node.outputs[0].dtype)


_WITH_BIAS = frozenset({Kind.CONV, Kind.GEMM, Kind.TRANSPOSED})


def _steps(site: Site, node: ir.Node, form: Form) -> list[tuple[str, _Attributes]]:
    """Operators and attributes of the chain's nodes."""
    match site.kind:
        case Kind.GEMM:
            return [("MatMul", {}), ("Gemm", {})]
        case Kind.EMBEDDING:
            return [("Gather", {}), ("MatMul", {})]
        case Kind.CONV | Kind.TRANSPOSED:
            pass
        case _:
            return [("MatMul", {}), ("MatMul", {})]
    whole: _Attributes = {a.name: a.value for a in node.attributes.values()}
    point: _Attributes = {"kernel_shape": list(_ones(site))}
    if site.kind is Kind.TRANSPOSED:
        return [("Conv", point), ("ConvTranspose", whole)]
    orders: dict[Form, list[_Attributes]] = {
        Form.OUTPUT: [whole, point],
        Form.INPUT: [point, whole],
        Form.TUCKER: [point, whole, point],
    }
    parts = orders.get(form) or [_along(whole, axis) for axis in (0, 1)]
    return [("Conv", part) for part in parts]


def _along(attributes: _Attributes, axis: int) -> _Attributes:
    """Attributes of a 2-d convolution for the part that runs along ``axis`` alone."""
    part = dict(attributes)
    for name in ("kernel_shape", "strides", "dilations", "pads"):
        values = part.get(name)
        if isinstance(values, list | tuple):
            idle = 0 if name == "pads" else 1
            part[name] = [v if i % 2 == axis else idle for i, v in enumerate(values)]
    return part


def _insert(node: ir.Node, made: ir.Node) -> None:
    if node.graph is None:
        raise TypeError(f"node '{node.name}' is in no graph")
    node.graph.insert_before(node, made)


def _take_over(node: ir.Node, made: ir.Node) -> None:
    """Let the output of ``made`` stand for that of ``node``, which goes."""
    old, new = node.outputs[0], made.outputs[0]
    new.type, new.shape = old.type, old.shape
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if node.graph is not None:
        node.graph.remove(node, safe=True)
    new.name = name


def _store(model: ir.Model, name: str, array: Array) -> None:
    tensor = constant_tensor(model.graph.initializers[name])
    dtype = np.dtype(np.float32) if tensor is None else tensor.numpy().dtype
    set_initializer(model.graph, name, np.ascontiguousarray(array).astype(dtype))
