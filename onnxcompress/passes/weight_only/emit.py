"""Write quantized weights into a graph.

With codes ``q``, scales ``s`` and zero points ``z`` (left out on a symmetric grid):

    MatMul(x, W)   ->  MatMulNBits(x, q, s, z)               two codes per byte, blocks along K
    Gather(W, i)   ->  GatherBlockQuantized(q, i, s, z)      blocks along the last axis
                   or  (Cast(Gather(q, i)) - z_i) * Gather(s, i)    one scale per row
    W              ->  (Cast(q) - Cast(z)) * s               depends on constants alone, so that
                                                             onnxruntime computes it at load
                   or  DequantizeLinear(q, s, z)
                   or  (Cast(digits of bytes) - m) * s         binary and ternary weights

Blocks of a folded weight lie in a tensor [R, B, b], which Reshape, Slice (without the filling) and
Transpose bring into the form of the weight.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress.graph.constants import set_initializer
from onnxcompress.graph.naming import Namer
from onnxcompress.numerics.blockwise import Blocks, pack
from onnxcompress.numerics.signs import Signs
from onnxcompress.passes._foldable import Chain
from onnxcompress.passes._layout import Layout
from onnxcompress.passes._packing import packed_digits
from onnxcompress.passes.weight_only.options import WeightOnlyOptions
from onnxcompress.passes.weight_only.select import Form, Weight

_MICROSOFT = "com.microsoft"
Array = npt.NDArray[np.generic]


class Emitter:
    """Replaces weights of one model.

    Args:
        model: The model to change.
        options: The options of the pass.
    """

    def __init__(self, model: ir.Model, options: WeightOnlyOptions) -> None:
        self._model, self._options, self._namer = model, options, Namer(model)

    def write(self, weight: Weight, blocks: Blocks | Signs) -> None:
        """Put the quantized form in the place of ``weight``, whose float data are dropped."""
        if isinstance(blocks, Signs):
            self._signs(weight, blocks)
            return
        match weight.form:
            case Form.MATMUL_NBITS:
                self._matmul(weight, blocks)
            case Form.GATHER_BLOCKS:
                self._gather_blocks(weight, blocks)
            case Form.GATHERED_ROWS:
                self._gathered_rows(weight, blocks)
            case Form.FOLDABLE:
                self._foldable(weight, blocks)
            case Form.DEQUANTIZE:
                self._dequantize(weight, blocks)
        weight.graph.initializers.pop(weight.name, None)

    # --- kernels of onnxruntime ------------------------------------------------------------------

    def _matmul(self, weight: Weight, blocks: Blocks) -> None:
        rows, bits = weight.layout.row_count, blocks.bits
        codes = self._constant(weight, "codes", pack(blocks.codes, bits))
        scale = self._constant(weight, "scale", blocks.scale)
        zero = self._packed_zero(weight, blocks)
        for node, _ in list(weight.value.uses()):
            data, bias = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
            inputs = [data, codes, scale, zero]
            fused = bias is not None and bias.shape is not None and bias.shape == (rows,)
            if fused:
                inputs += [None, bias]
            attributes = {
                "K": weight.layout.columns,
                "N": rows,
                "bits": bits,
                "block_size": blocks.block,
                "accuracy_level": self._options.accuracy_level,
            }
            product = self._node(node, "matmul", "MatMulNBits", inputs, attributes, _MICROSOFT)
            last = product
            if bias is not None and not fused:
                _typed(product, node.outputs[0])
                product.outputs[0].name = self._namer.value(f"{node.name}/weights_product")
                last = self._node(node, "add", "Add", [product.outputs[0], bias])
                _before(node, product)
            _replace(node, last)

    def _gather_blocks(self, weight: Weight, blocks: Blocks) -> None:
        flat = blocks.codes.reshape(len(blocks.codes), -1)[:, : blocks.columns]
        codes = self._constant(weight, "codes", pack(flat, blocks.bits))
        scale = self._constant(weight, "scale", blocks.scale)
        zero = self._packed_zero(weight, blocks)
        attributes = {
            "gather_axis": 0,
            "quantize_axis": 1,
            "block_size": blocks.block,
            "bits": blocks.bits,
        }
        for node, _ in list(weight.value.uses()):
            inputs = [codes, node.inputs[1], scale, zero]
            kernel = self._node(
                node, "gather", "GatherBlockQuantized", inputs, attributes, _MICROSOFT
            )
            _replace(node, kernel)

    def _packed_zero(self, weight: Weight, blocks: Blocks) -> ir.Value | None:
        if self._options.symmetric:
            return None
        return self._constant(weight, "zero", pack(blocks.zero, blocks.bits))

    # --- standard operators ----------------------------------------------------------------------

    def _gathered_rows(self, weight: Weight, blocks: Blocks) -> None:
        layout = weight.layout
        codes, zero = self._integers(weight, blocks, layout.tensor(_flat(blocks)), layout.per_row)
        scale = self._constant(weight, "scale", blocks.scale.reshape(layout.per_row))
        for node, _ in list(weight.value.uses()):
            indices = node.inputs[1]

            def gathered(
                source: ir.Value,
                role: str,
                node: ir.Node = node,
                indices: ir.Value | None = indices,
            ) -> ir.Value:
                return self._step(node, role, "Gather", [source, indices], {"axis": 0})

            steps = self._cast(node, "codes", gathered(codes, "codes"))
            if zero is not None:
                offset = self._cast(node, "zero", gathered(zero, "zero"))
                steps = self._step(node, "centred", "Sub", [steps, offset])
            product = self._node(node, "rows", "Mul", [steps, gathered(scale, "scale")])
            _replace(node, product)

    def _foldable(self, weight: Weight, blocks: Blocks) -> None:
        layout = weight.layout
        whole = blocks.codes.shape[1] == 1
        if whole:
            data: Array = layout.tensor(_flat(blocks))
            shape: tuple[int, ...] = layout.per_row
        else:
            data, shape = blocks.codes, (*blocks.scale.shape, 1)
        codes, zero = self._integers(weight, blocks, data, shape)
        scale = self._constant(weight, "scale", blocks.scale.reshape(shape))
        chain = self._chain(weight)
        value = chain.add("Cast", [codes], to=int(ir.DataType.FLOAT))
        if zero is not None:
            offset = chain.add("Cast", [zero], to=int(ir.DataType.FLOAT))
            value = chain.add("Sub", [value, offset])
        value = chain.add("Mul", [value, scale])
        if not whole:
            value = _unblocked(chain, weight.layout, blocks.codes.shape, value)
        chain.finish(value)

    def _signs(self, weight: Weight, signs: Signs) -> None:
        """``(Cast(digits) - m) step``: two or three values, several to a byte."""
        layout = weight.layout
        whole = signs.codes.shape[1] == 1
        codes = layout.tensor(signs.flat()).astype(np.uint8) if whole else signs.codes
        shape = layout.per_row if whole else (*signs.scale.shape, 1)
        chain = self._chain(weight)
        packed = packed_digits(codes, signs.levels)
        value = chain.digits("codes", packed, signs.levels, codes.shape)
        value = chain.add("Cast", [value], to=int(ir.DataType.FLOAT))
        middle = chain.constant("middle", np.array(signs.middle, np.float32))
        value = chain.add("Sub", [value, middle])
        value = chain.add("Mul", [value, chain.constant("scale", signs.step.reshape(shape))])
        if not whole:
            value = _unblocked(chain, layout, codes.shape, value)
        chain.finish(value)

    def _dequantize(self, weight: Weight, blocks: Blocks) -> None:
        layout = weight.layout
        (row,) = layout.rows
        attributes: dict[str, int] = {"axis": row}
        shape: tuple[int, ...] = (layout.row_count,)
        scales, zeros = blocks.scale, blocks.zero
        if blocks.codes.shape[1] > 1:
            attributes = {"axis": 1 - row, "block_size": blocks.block}
            scales, zeros = (scales, zeros) if row == 0 else (scales.T, zeros.T)
            shape = scales.shape
        data = layout.tensor(_flat(blocks))
        codes, zero = self._integers(weight, blocks, data, shape, np.ascontiguousarray(zeros))
        scale = self._constant(weight, "scale", np.ascontiguousarray(scales).reshape(shape))
        chain = self._chain(weight)
        inputs = [codes, scale] if zero is None else [codes, scale, zero]
        chain.finish(chain.add("DequantizeLinear", inputs, **attributes))

    def _integers(
        self,
        weight: Weight,
        blocks: Blocks,
        data: Array,
        shape: tuple[int, ...],
        zeros: Array | None = None,
    ) -> tuple[ir.Value, ir.Value | None]:
        """Codes, and zero points of ``shape``: signed without, unsigned with zero points."""
        four = blocks.bits == 4
        if self._options.symmetric:
            half = 1 << (blocks.bits - 1)
            signed = (data.astype(np.int16) - half).astype(np.int8)
            dtype = ir.DataType.INT4 if four else ir.DataType.INT8
            return self._constant(weight, "codes", signed, dtype), None
        dtype = ir.DataType.UINT4 if four else ir.DataType.UINT8
        source = blocks.zero if zeros is None else zeros
        return (
            self._constant(weight, "codes", data, dtype),
            self._constant(weight, "zero", source.reshape(shape), dtype),
        )

    # --- small parts -----------------------------------------------------------------------------

    def _constant(
        self, weight: Weight, role: str, array: Array, dtype: ir.DataType | None = None
    ) -> ir.Value:
        name = self._namer.value(f"{weight.name}/weights_{role}")
        return set_initializer(weight.graph, name, np.ascontiguousarray(array), dtype=dtype)

    def _cast(self, node: ir.Node, role: str, value: ir.Value) -> ir.Value:
        return self._step(node, f"{role}_float", "Cast", [value], {"to": int(ir.DataType.FLOAT)})

    def _step(
        self,
        node: ir.Node,
        role: str,
        op_type: str,
        inputs: list[ir.Value | None],
        attributes: dict[str, int] | None = None,
    ) -> ir.Value:
        """A node before ``node`` and its named output."""
        made = self._node(node, role, op_type, inputs, attributes)
        made.outputs[0].name = self._namer.value(f"{node.name}/weights_{role}_value")
        _before(node, made)
        return made.outputs[0]

    def _node(
        self,
        node: ir.Node,
        role: str,
        op_type: str,
        inputs: list[ir.Value | None],
        attributes: dict[str, int] | None = None,
        domain: str = "",
    ) -> ir.Node:
        if domain:
            self._model.opset_imports.setdefault(domain, 1)
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        return ir.node(
            op_type,
            inputs,
            attributes or None,
            domain=domain,
            name=self._namer.node(f"{node.name}/weights_{role}"),
        )

    def _chain(self, weight: Weight) -> Chain:
        return Chain(self._namer, weight.value, weight.graph, "weights")


def _unblocked(chain: Chain, layout: Layout, shape: tuple[int, ...], value: ir.Value) -> ir.Value:
    """Bring [R, B, b] = ``shape`` into the form of the weight."""
    rows, count, block = shape
    if count * block != layout.columns:
        flat = chain.constant("flat", np.array([rows, count * block]))
        bounds = [
            chain.constant(role, np.array([number]))
            for role, number in (("start", 0), ("stop", layout.columns), ("axis", 1))
        ]
        value = chain.add("Slice", [chain.add("Reshape", [value, flat]), *bounds])
    value = chain.add("Reshape", [value, chain.constant("shape", np.array(layout.permuted))])
    if layout.back != tuple(range(len(layout.back))):
        value = chain.add("Transpose", [value], perm=list(layout.back))
    return value


def _flat(blocks: Blocks) -> npt.NDArray[np.uint8]:
    """The codes without filling, [R, D]."""
    return blocks.codes.reshape(len(blocks.codes), -1)[:, : blocks.columns]


def _before(node: ir.Node, made: ir.Node) -> None:
    if node.graph is None:
        raise TypeError(f"node '{node.name}' is in no graph")
    node.graph.insert_before(node, made)


def _typed(made: ir.Node, like: ir.Value) -> None:
    made.outputs[0].type, made.outputs[0].shape = like.type, like.shape


def _replace(node: ir.Node, made: ir.Node) -> None:
    """Put ``made`` in the place of ``node``; its output takes over name, type and uses."""
    _before(node, made)
    old, new = node.outputs[0], made.outputs[0]
    _typed(made, old)
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if node.graph is not None:
        node.graph.remove(node, safe=True)
    new.name = name
