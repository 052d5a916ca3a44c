"""The float and the quantized network side by side in one graph: what is off, and by how much.

Both run on the same inputs within one model, so differences are formed inside the graph and only
sums leave it. Two questions are asked:

- *Local error*: every integer node computes on the values of the float network. The ratio of its
  output to its error (SQNR) shows the nodes that cannot be quantized, whatever happens elsewhere.
- *Sequential bias correction*: the quantized network runs on its own values. At each layer ``y = Wx
  + b`` the mean over a batch of ``y_float - y_quantized``, per channel, is added before the values
  move on, so each layer is measured behind layers that are already corrected. The average over
  batches goes into the bias:

      b ← b + E(y_float - y_quantized)

  One run of the data corrects all layers; correcting them one after another takes as many runs as
  layers.

Source: Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction"
    (the
empirical variant).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from onnxcompress.calibration.statistics import MeanRequest, MeanResult
from onnxcompress.context import PassContext
from onnxcompress.graph.constants import set_initializer
from onnxcompress.graph.naming import Namer
from onnxcompress.numerics.affine import FloatArray
from onnxcompress.passes.quant.samples import few_samples

_BATCH_SIZE = 16
"""Samples per run: the mean over so many differs little from the mean over all."""

_CAP_DB = 200.0


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantized network as comparison sees it.

    Attributes:
        model: The network with Q/DQ pairs.
        reals: Point to the output of its DequantizeLinear.
    """

    model: ir.Model
    reals: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Correction:
    """What one run of both networks showed.

    Attributes:
        shifts: Weighted node to what its bias lacks, [O].
        output_sqnr_db: SQNR of each floating-point output of the model, with the biases corrected.
        logit_sqnr_db: For those that a Softmax makes, the SQNR of what it reads, but for what is
            added to all classes alike. Probabilities of sure classes show no noise, so their
            SQNR hangs on the few samples that are not sure.
    """

    shifts: Mapping[str, FloatArray]
    output_sqnr_db: Mapping[str, float]
    logit_sqnr_db: Mapping[str, float] = field(default_factory=dict)

    @property
    def rank_db(self) -> float:
        """What versions of one model are compared by: SQNR of the worst output, or its logits."""
        return min({**self.output_sqnr_db, **self.logit_sqnr_db}.values(), default=math.inf)

    def joined(self, other: Correction, share: float) -> Correction:
        """What both runs together showed, of the same network on other samples.

        Args:
            other: The other run.
            share: Share of the samples that it had.
        """
        return Correction(
            {n: (1 - share) * s + share * other.shifts[n] for n, s in self.shifts.items()},
            _joined_db(self.output_sqnr_db, other.output_sqnr_db, share),
            _joined_db(self.logit_sqnr_db, other.logit_sqnr_db, share),
        )


def _joined_db(
    mine: Mapping[str, float], theirs: Mapping[str, float], share: float
) -> dict[str, float]:
    """SQNR over two sets of samples, of which the second has ``share``."""
    return {
        name: -10.0 * math.log10((1 - share) * _ratio(db) + share * _ratio(theirs[name]))
        for name, db in mine.items()
    }


def _ratio(db: float) -> float:
    """Noise over signal."""
    return float(10.0 ** (-db / 10.0))


def local_sqnr_db(
    ctx: PassContext, model: ir.Model, quantized: Quantized, results: Mapping[str, str]
) -> dict[str, float]:
    """SQNR of each node's output when its inputs are those of the float network.

    Args:
        ctx: The job; all of its samples are taken.
        model: The float model.
        quantized: The quantized network.
        results: Node to the value it makes, in the names of the float model.
    """
    pair = _Pair(model, quantized)
    pair.feed_from_float()
    requests = {node: pair.compare(value, pair.twin(value)) for node, value in results.items()}
    return pair.ratios(ctx, requests, "checking nodes")


def correct_biases(
    ctx: PassContext, model: ir.Model, quantized: Quantized, nodes: Mapping[str, int]
) -> Correction:
    """Measure what the biases of ``nodes`` lack, each behind the corrected layers before it.

    Args:
        ctx: The job.
        model: The float model.
        quantized: The quantized network.
        nodes: Weighted node to the axis of its output that runs over channels; none to only compare
            outputs.
    """
    pair = _Pair(model, quantized)
    shifts = {
        name: MeanRequest(pair.correct(name, axis).name or "", 1) for name, axis in nodes.items()
    }
    outputs = {
        value.name or "": pair.compare(value.name or "", pair.quantized_output(k))
        for k, value in enumerate(model.graph.outputs)
        if value.dtype == ir.DataType.FLOAT and not value.is_initializer()
    }
    logits = {
        value.name or "": compared
        for value in model.graph.outputs
        if value.name in outputs and (compared := pair.compare_logits(value)) is not None
    }
    pair.model.graph.sort()
    few = ctx if nodes else few_samples(ctx)
    wide = replace(few, batch_size=_even_batch(few))
    both_sides = [*outputs.values(), *logits.values()]
    requests = [*shifts.values(), *(r for both in both_sides for r in both)]
    found = wide.collect(pair.model, requests, description="correcting biases")
    return Correction(
        shifts={name: found[request].mean for name, request in shifts.items()},
        output_sqnr_db={
            name: sqnr_db(_energy(found[signal]), _energy(found[noise]))
            for name, (signal, noise) in outputs.items()
        },
        logit_sqnr_db={
            name: sqnr_db(_energy(found[signal]), _energy(found[noise]))
            for name, (signal, noise) in logits.items()
            if math.isfinite(_energy(found[noise]))  # masks add minus infinity
        },
    )


def _even_batch(ctx: PassContext) -> int:
    """A batch size that divides the samples evenly: each batch's mean weighs the same."""
    samples = 1 if ctx.calibration is None else max(ctx.calibration.sample_count, 1)
    size = max(ctx.batch_size, _BATCH_SIZE)
    return -(-samples // -(-samples // size))


def sqnr_db(signal: float, noise: float) -> float:
    """``10 log₁₀(signal / noise)``, within ±200 dB; no noise at all is 200 dB."""
    if noise <= 0:
        return _CAP_DB
    return float(np.clip(10 * np.log10(max(signal, 1e-300) / noise), -_CAP_DB, _CAP_DB))


def _energy(result: MeanResult) -> float:
    return float(result.mean.sum())


_Comparison = tuple[MeanRequest, MeanRequest]


class _Pair:
    """One graph with both networks on the same inputs; names of the float network stay."""

    def __init__(self, model: ir.Model, quantized: Quantized) -> None:
        self.model = model.clone()
        graph = self.model.graph
        self._namer = Namer(self.model)
        self._floats = _values(graph)
        self._float_nodes = {n.name: n for n in graph if n.name}
        copy = quantized.model.clone()
        self.model.opset_imports.update(copy.opset_imports)
        twins = _values(copy.graph)
        self._reals = {point: twins[name] for point, name in quantized.reals.items()}
        self._twins = twins | self._reals
        self._nodes = {n.name: n for n in copy.graph if n.name}
        self._outputs = list(copy.graph.outputs)
        self._graft(copy)
        self._flat_shape = set_initializer(
            graph, self._namer.value("quant_flat_shape"), np.array([1, -1], np.int64)
        )
        self._opset = self.model.opset_imports.get("", 0)

    def _graft(self, copy: ir.Model) -> None:
        """Move the nodes of ``copy`` over, its inputs replaced by those that are there."""
        graph = self.model.graph
        for node in copy.graph.all_nodes():
            node.name = self._namer.node(f"{node.name}/quant_twin")
            for output in node.outputs:
                if output.name:
                    output.name = self._namer.value(f"{output.name}/quant_twin")
        for inner in copy.graphs():
            if inner is not copy.graph:
                for value in (*inner.inputs, *inner.initializers.values()):
                    value.name = self._namer.value(f"{value.name}/quant_twin")
        for mine, theirs in zip(copy.graph.inputs, graph.inputs, strict=True):
            mine.replace_all_uses_with(theirs)
        for name, value in list(copy.graph.initializers.items()):
            del copy.graph.initializers[name]
            same = graph.initializers.get(name)
            if same is not None and same.const_value is value.const_value:
                for node, place in list(value.uses()):  # it may also be an output of the copy
                    node.replace_input_with(place, same)
                continue
            value.name = self._namer.value(f"{name}/quant_twin")
            graph.register_initializer(value)
        nodes = list(copy.graph)
        copy.graph.outputs.clear()
        copy.graph.remove(nodes)
        graph.extend(nodes)

    def twin(self, name: str) -> ir.Value:
        """The value ``name`` in the quantized network; dequantized if it is a point."""
        return self._twins[name]

    def quantized_output(self, place: int) -> ir.Value:
        """Output number ``place`` of the quantized network."""
        return self._outputs[place]

    def feed_from_float(self) -> None:
        """Let every integer node read the float network's values, quantized, instead of its own."""
        for point, real in self._reals.items():
            dq = real.producer()
            if dq is None:
                continue
            scale, zero = dq.inputs[1], dq.inputs[2]
            integer = self._add(
                "QuantizeLinear", [self._floats[point], scale, zero], real, domain=dq.domain
            )
            integer.type = ir.TensorType(
                zero.dtype if zero is not None and zero.dtype else ir.DataType.UINT8
            )
            fresh = self._add("DequantizeLinear", [integer, scale, zero], real, domain=dq.domain)
            raw = dq.inputs[0]
            real.replace_all_uses_with(fresh)
            if raw is None:
                continue
            for node, place in list(raw.uses()):  # nodes that move integers themselves
                if node is not dq:
                    node.replace_input_with(place, integer)

    def correct(self, name: str, axis: int) -> ir.Value:
        """Add the batch mean of the error, per channel, to the output of node ``name``.

        Returns:
            That mean, [1, channels].
        """
        output = self._nodes[name].outputs[0]
        readers = list(output.uses())
        error = self._add("Sub", [self._float_nodes[name].outputs[0], output], output)
        rank = len(output.shape) if output.shape is not None else 0
        axes = [i for i in range(rank) if i != axis % rank]
        mean = self._mean(error, axes, output)
        corrected = self._add("Add", [output, mean], output)
        for node, place in readers:
            node.replace_input_with(place, corrected)
        return self._flat(mean)

    def _mean(self, value: ir.Value, axes: list[int], like: ir.Value) -> ir.Value:
        if self._opset >= 18:
            where = set_initializer(
                self.model.graph,
                self._namer.value(f"{like.name}/quant_axes"),
                np.array(axes, np.int64),
            )
            mean = self._add("ReduceMean", [value, where], like, {"keepdims": 1})
        else:
            mean = self._add("ReduceMean", [value], like, {"keepdims": 1, "axes": axes})
        mean.shape = None
        return mean

    def compare(self, name: str, other: ir.Value) -> _Comparison:
        """Requests for the energies of the float value ``name`` and of what ``other`` lacks."""
        mine = self._floats[name]
        noise = self._add("Sub", [mine, other], mine)
        return self._energy(mine), self._energy(noise)

    def compare_logits(self, output: ir.Value) -> _Comparison | None:
        """The same for what the Softmax behind ``output`` reads, less its mean over the classes.

        None where no Softmax makes it, or what it reads is not computed in both networks.
        """
        softmax = output.producer()
        if softmax is None or softmax.op_type != "Softmax" or softmax.domain not in {"", "ai.onnx"}:
            return None
        name = "" if softmax.inputs[0] is None else softmax.inputs[0].name or ""
        if name not in self._floats or name not in self._twins:
            return None
        axis = softmax.attributes.get_int("axis", -1)
        mine = self._floats[name]
        noise = self._add("Sub", [mine, self._twins[name]], mine)
        signal, error = (self._energy(self._centred(each, axis)) for each in (mine, noise))
        return signal, error

    def _centred(self, value: ir.Value, axis: int) -> ir.Value:
        mean = self._mean(value, [axis], value)
        return self._add("Sub", [value, mean], value)

    def _energy(self, value: ir.Value) -> MeanRequest:
        """Request for the mean over runs of the sum of squares of ``value``."""
        total = self._add("ReduceSumSquare", [value], value, {"keepdims": 0})
        total.shape = ir.Shape([])
        return MeanRequest(self._flat(total).name or "", 1)

    def _flat(self, value: ir.Value) -> ir.Value:
        flat = self._add("Reshape", [value, self._flat_shape], value)
        flat.shape = ir.Shape([1, None])
        return flat

    def _add(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        like: ir.Value,
        attributes: Mapping[str, int | list[int]] | None = None,
        domain: str = "",
    ) -> ir.Value:
        name = f"{like.name}/quant_{op_type.lower()}"
        output = ir.Value(
            name=self._namer.value(name), shape=like.shape, type=ir.TensorType(ir.DataType.FLOAT)
        )
        node = ir.node(
            op_type,
            inputs,
            dict(attributes or {}),
            outputs=[output],
            domain=domain,
            name=self._namer.node(name),
        )
        self.model.graph.append(node)
        return output

    def ratios(
        self, ctx: PassContext, requests: Mapping[str, _Comparison], description: str
    ) -> dict[str, float]:
        """Collect comparisons and turn each into an SQNR in dB."""
        self.model.graph.sort()
        found = ctx.collect(
            self.model, [r for both in requests.values() for r in both], description=description
        )
        return {
            name: sqnr_db(_energy(found[signal]), _energy(found[noise]))
            for name, (signal, noise) in requests.items()
        }


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    """Inputs and computed values of the main graph by name."""
    found = {v.name or "": v for v in graph.inputs}
    return found | {v.name or "": v for node in graph for v in node.outputs if v.name}
