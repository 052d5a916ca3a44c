"""A small builder of test models: seeded weights, few words per node."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

Array = npt.NDArray[np.generic]
Dim = int | str | None


class ModelBuilder:
    """Collects nodes and seeded weights and makes a checked :class:`onnx_ir.Model` of them.

    Args:
        name: Name of the graph; it also seeds the weights, so that a fixture never changes with
            others.
        opset: Version of the default operator set.
        ir_version: Version of the file format.
        dtype: Element type of inputs, weights and outputs where none is given.
        domains: Further operator sets.
    """

    def __init__(
        self,
        name: str,
        *,
        opset: int = 17,
        ir_version: int = 8,
        dtype: type[np.generic] = np.float32,
        domains: Mapping[str, int] | None = None,
    ) -> None:
        self.name, self.opset, self.ir_version = name, opset, ir_version
        self.dtype = np.dtype(dtype)
        self.domains = dict(domains or {})
        self.rng = np.random.default_rng(zlib.crc32(name.encode()))
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self._counts: dict[str, int] = {}

    def input(self, name: str, shape: Sequence[Dim], dtype: type[np.generic] | None = None) -> str:
        self.inputs.append(self._info(name, shape, np.dtype(dtype or self.dtype)))
        return name

    def output(
        self, value: str, shape: Sequence[Dim] | None = None, dtype: type[np.generic] | None = None
    ) -> None:
        self.outputs.append(self._info(value, shape, np.dtype(dtype or self.dtype)))

    def weight(
        self,
        *shape: int,
        fan_in: int | None = None,
        name: str | None = None,
        low: float | None = None,
    ) -> str:
        """Normal weights of variance 1/fan_in (default: axes 1 and up), or uniform low to 1."""
        if low is not None:
            data = self.rng.uniform(low, 1.0, shape)
        else:
            fan = fan_in or int(np.prod(shape[1:])) or 1
            data = self.rng.normal(0, fan**-0.5, shape)
        return self.constant(data.astype(self.dtype), name)

    def constant(self, array: npt.ArrayLike, name: str | None = None) -> str:
        """An initializer; integers become int64, Python floats the builder's type."""
        data = np.asarray(array)
        if not isinstance(array, np.ndarray):
            data = data.astype(np.int64 if data.dtype.kind in "iu" else self.dtype)
        name = name or self._fresh("const")
        data = np.ascontiguousarray(data).reshape(data.shape)
        self.initializers.append(numpy_helper.from_array(data, name))
        return name

    def op(self, op_type: str, *inputs: str, domain: str = "", **attributes: object) -> str:
        """Add a node with one output; returns the output's name."""
        return self.ops(op_type, *inputs, outputs=1, domain=domain, **attributes)[0]

    def ops(
        self, op_type: str, *inputs: str, outputs: int, domain: str = "", **attributes: object
    ) -> list[str]:
        """Add a node with several outputs; returns their names."""
        name = self._fresh(op_type.lower())
        names = [f"{name}_out" if outputs == 1 else f"{name}_out{i}" for i in range(outputs)]
        node = helper.make_node(op_type, inputs, names, name=name, domain=domain)
        node.attribute.extend(
            helper.make_attribute(key, value)
            for key, value in attributes.items()
            if value is not None
        )
        self.nodes.append(node)
        return names

    def conv(
        self,
        x: str,
        channels: int,
        width: int,
        kernel: int = 3,
        *,
        groups: int = 1,
        stride: int = 1,
        pad: int | None = None,
        bias: bool = True,
        rank: int = 2,
    ) -> str:
        """A convolution with new weights; padded to keep the size when ``pad`` is None."""
        pad = kernel // 2 if pad is None else pad
        inputs = [x, self.weight(width, channels // groups, *[kernel] * rank)]
        if bias:
            inputs.append(self.weight(width, fan_in=16))
        return self.op(
            "Conv",
            *inputs,
            kernel_shape=[kernel] * rank,
            strides=[stride] * rank,
            pads=[pad] * 2 * rank,
            group=groups,
        )

    def batch_norm(self, x: str, channels: int) -> str:
        """Batch normalization with statistics that are far from the identity."""
        scale = self.weight(channels, low=0.5)
        shift = self.weight(channels, fan_in=4)
        mean = self.weight(channels, fan_in=4)
        variance = self.weight(channels, low=0.3)
        return self.op("BatchNormalization", x, scale, shift, mean, variance, epsilon=1e-3)

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        """MatMul and Add."""
        product = self.op("MatMul", x, self.weight(inputs, outputs, fan_in=inputs))
        return self.op("Add", product, self.weight(outputs, fan_in=16))

    def gemm(self, x: str, inputs: int, outputs: int) -> str:
        """Gemm as PyTorch writes it, with a transposed weight."""
        return self.op(
            "Gemm", x, self.weight(outputs, inputs), self.weight(outputs, fan_in=16), transB=1
        )

    def share_names(self, outer: ModelBuilder) -> None:
        """Keep the names inside a subgraph apart from those of the graph around it."""
        self._counts = outer._counts

    def initializers_as_inputs(self) -> None:
        """List the initializers among the inputs, as files of IR version 3 must."""
        for tensor in self.initializers:
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            self.inputs.append(self._info(tensor.name, list(tensor.dims), dtype))

    def subgraph(self, name: str, output: str, build: ModelBuilder) -> onnx.GraphProto:
        """The nodes of another builder as a subgraph without inputs."""
        info = helper.make_empty_tensor_value_info(output)
        return helper.make_graph(build.nodes, name, [], [info], build.initializers)

    def proto(self) -> onnx.ModelProto:
        """The checked model; output shapes that were not given are inferred."""
        graph = helper.make_graph(
            self.nodes, self.name, self.inputs, self.outputs, self.initializers
        )
        imports = [helper.make_opsetid("", self.opset)]
        imports += [helper.make_opsetid(d, v) for d, v in self.domains.items()]
        model = helper.make_model(
            graph, opset_imports=imports, ir_version=self.ir_version, producer_name="tests"
        )
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        for ours, theirs in zip(model.graph.output, inferred.graph.output, strict=True):
            ours.CopyFrom(theirs)
        onnx.checker.check_model(model, full_check=not self.domains)
        return model

    def build(self) -> ir.Model:
        return ir.from_proto(self.proto())

    def _fresh(self, base: str) -> str:
        count = self._counts.get(base, 0)
        self._counts[base] = count + 1
        return f"{base}_{count}"

    @staticmethod
    def _info(
        name: str, shape: Sequence[Dim] | None, dtype: np.dtype[np.generic]
    ) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape)
