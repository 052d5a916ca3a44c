"""What a channel count costs in time: stacks of 3x3 convolutions at batch 8, one thread.

    python benchmarks/kernel_steps.py

Each stack has eight convolutions that go from a fixed width to the tried one and back, as the two
of a residual block do. Prints processor time relative to the full width and, in brackets, what
pruning reckons with (`MacsModel.padded`) where kernels compute channels in blocks of 16.
"""

from __future__ import annotations

import time

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from onnxcompress import model_io
from onnxcompress.graph.canonical import canonicalize
from onnxcompress.graph.labels import analyse
from onnxcompress.graph.macs import MacsModel

STACKS: tuple[tuple[int, int, tuple[int, ...]], ...] = (
    (16, 32, (4, 8, 12, 16)),
    (32, 16, (8, 12, 16, 20, 24, 28, 32)),
    (64, 8, (8, 16, 24, 32, 40, 48, 56, 64)),
)
"""Width outside, height and width of the image, widths to try inside."""
_BATCH = 8
_BLOCK = 16
_TURNS = 25


def main() -> None:
    random = np.random.default_rng(0)
    for outside, size, widths in STACKS:
        models = {w: stack(outside, w, size, random) for w in widths}
        sessions = {w: opened(model) for w, model in models.items()}
        feeds = {"x": random.standard_normal((_BATCH, outside, size, size), dtype=np.float32)}
        best = dict.fromkeys(widths, float("inf"))
        for _ in range(_TURNS):
            for width, session in sessions.items():
                start = time.thread_time()
                session.run(None, feeds)
                best[width] = min(best[width], time.thread_time() - start)
        full = widths[-1]
        text = " ".join(
            f"{w}:{best[w] / best[full]:.2f} ({reckoned(models[w]) / reckoned(models[full]):.2f})"
            for w in widths
        )
        print(f"{outside} channels, {size}x{size}, inner width and time  {text}", flush=True)


def reckoned(model: onnx.ModelProto) -> int:
    """The time of a run as pruning reckons it."""
    graph = ir.from_proto(model)
    model_io.normalize(graph)
    canonicalize(graph)
    return MacsModel(graph, analyse(graph)).padded({}, _BLOCK)


def stack(outside: int, inside: int, size: int, random: np.random.Generator) -> onnx.ModelProto:
    """Eight convolutions with a Relu after each."""
    nodes, weights, last = [], [], "x"
    for number in range(8):
        a, b = (outside, inside) if number % 2 == 0 else (inside, outside)
        weight = 0.05 * random.standard_normal((b, a, 3, 3), dtype=np.float32)
        weights.append(numpy_helper.from_array(weight.astype(np.float32), f"w{number}"))
        nodes.append(
            helper.make_node("Conv", [last, f"w{number}"], [f"y{number}"], pads=[1, 1, 1, 1])
        )
        nodes.append(helper.make_node("Relu", [f"y{number}"], [f"z{number}"]))
        last = f"z{number}"
    shape = [_BATCH, outside, size, size]
    graph = helper.make_graph(
        nodes,
        "stack",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, shape)],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def opened(model: onnx.ModelProto) -> ort.InferenceSession:
    """A session on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options)


if __name__ == "__main__":
    main()
