"""Sessions, the optimized graph, latency and profiles."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper

from onnxcompress import _session, model_io, runtime
from onnxcompress.errors import ModelError, ProviderError, UsageError
from onnxcompress.interface import TensorSpec
from onnxcompress.runtime import Array, Optimization, SessionSettings

HEADER = '<ir_version: 8, opset_import: ["" : 17]>'
WEIGHTS = np.random.default_rng(0).standard_normal((4, 300)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)
EXPECTED = np.maximum(X @ WEIGHTS, 0)


def parse(text: str, **initializers: Array) -> ir.Model:
    proto = onnx.parser.parse_model(HEADER + text)
    for name, array in initializers.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    model = ir.from_proto(proto)
    model_io.name_nodes(model)
    return model


def linear() -> ir.Model:
    return parse(
        "g (float[N,4] x) => (float[N,300] y) { [mm] a = MatMul(x, w) [act] y = Relu(a) }",
        w=WEIGHTS,
    )


def close(array: Array, expected: Array = EXPECTED) -> bool:
    return bool(np.allclose(array, expected, rtol=1e-5, atol=1e-6))


def test_interface_of_a_session() -> None:
    session = runtime.open_session(linear())
    assert session.inputs == (TensorSpec("x", np.dtype(np.float32), ("N", 4)),)
    assert session.outputs == (TensorSpec("y", np.dtype(np.float32), ("N", 300)),)
    assert session.providers == ("CPUExecutionProvider",)


@pytest.mark.parametrize("optimization", list(Optimization))
@pytest.mark.parametrize("low_memory", [False, True])
def test_every_setting_computes_the_same(optimization: Optimization, low_memory: bool) -> None:
    settings = SessionSettings(threads=1, optimization=optimization, low_memory=low_memory)
    assert close(runtime.open_session(linear(), settings).run({"x": X})["y"])


def test_settings_reach_onnxruntime() -> None:
    options = _session._options(SessionSettings(low_memory=True, threads=3))
    assert not options.enable_cpu_mem_arena
    assert not options.enable_mem_pattern
    assert options.execution_order == onnxruntime.ExecutionOrder.PRIORITY_BASED
    assert options.intra_op_num_threads == 3


def test_some_outputs_only_and_numpy_scalars() -> None:
    model = parse("g (float[2] x, int64 k) => (float[2] y, int64 z) { y = Neg(x) z = Neg(k) }")
    session = runtime.open_session(model)
    assert list(session.run({"x": np.ones(2, np.float32), "k": np.int64(3)}, ["z"])) == ["z"]  # type: ignore[dict-item]


def test_external_tensors_of_two_folders_are_not_copied(tmp_path: Path) -> None:
    """As when a model and its reference are joined into one graph."""
    for name in "ab":
        (tmp_path / name).mkdir()
        model_io.save(linear(), tmp_path / name / "m.onnx", external_data=True)
    model, other = (model_io.load(tmp_path / name / "m.onnx") for name in "ab")
    tensor = other.graph.initializers["w"].const_value
    assert tensor is not None
    value = ir.Value(
        name="v", const_value=tensor, shape=ir.Shape([4, 300]), type=ir.TensorType(tensor.dtype)
    )
    model.graph.register_initializer(value)
    matmul, relu = list(model.graph)
    doubled = ir.node("Add", [matmul.inputs[1], value], name="twice")
    model.graph.insert_before(matmul, doubled)
    matmul.replace_input_with(1, doubled.outputs[0])
    doubled.outputs[0].name = "doubled"
    before = sorted(p for p in tmp_path.rglob("*"))
    session = runtime.open_session(model, work_dir=tmp_path)
    assert sorted(p for p in tmp_path.rglob("*")) == before
    assert close(session.run({"x": X})["y"], 2 * EXPECTED)
    assert relu.op_type == "Relu"


@pytest.mark.parametrize("external", [False, True])
def test_large_tensors_in_memory_go_through_the_work_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool
) -> None:
    monkeypatch.setattr(_session, "IN_MEMORY_BYTES", 1000)
    model = linear()
    if external:
        model_io.save(model, tmp_path / "m.onnx", external_data=True)
        model = model_io.load(tmp_path / "m.onnx")
        model.graph.initializers["w"].const_value = ir.tensor(2 * WEIGHTS, name="w")
    work = tmp_path / "work"
    work.mkdir()
    session = runtime.open_session(model, work_dir=work)
    (scratch,) = work.iterdir()
    assert sum(p.stat().st_size for p in scratch.iterdir()) == WEIGHTS.nbytes
    assert close(session.run({"x": X})["y"], EXPECTED * (2 if external else 1))
    del session
    assert not list(work.iterdir())
    assert model.graph.initializers["w"].const_value is not None


def test_opening_a_session_does_not_change_the_model(tmp_path: Path) -> None:
    model_io.save(linear(), tmp_path / "m.onnx", external_data=True)
    model = model_io.load(tmp_path / "m.onnx")
    tensor = model.graph.initializers["w"].const_value
    runtime.open_session(model)
    assert model.graph.initializers["w"].const_value is tensor


def test_wrong_inputs_are_a_model_error() -> None:
    session = runtime.open_session(linear())
    with pytest.raises(ModelError, match=r"x: float32\[2, 5\]"):
        session.run({"x": np.ones((2, 5), np.float32)})
    with pytest.raises(ModelError, match="running the model failed"):
        session.run({"z": X})
    with pytest.raises(ModelError, match="float64"):
        session.run({"x": X.astype(np.float64)})


def test_a_failing_node_is_named() -> None:
    model = parse(
        "g (float[3] x, int64[1] i) => (float[1] y) { [lookup] y = Gather<axis=0>(x, i) }"
    )
    session = runtime.open_session(model)
    with pytest.raises(ModelError, match="lookup"):
        session.run({"x": np.ones(3, np.float32), "i": np.array([7])})


def test_too_little_memory_is_a_memory_error() -> None:
    model = parse("g (int64[1] n) => (float[N] y) { y = ConstantOfShape(n) }")
    session = runtime.open_session(model)
    with pytest.raises(MemoryError):
        session.run({"n": np.array([2**45])})


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    session = runtime.open_session(linear())
    with pytest.raises(ModelError):
        session.run({"x": np.ones((2, 5), np.float32)})
    with pytest.raises(ModelError):
        runtime.open_session(parse("g (float[2] x) => (float[2] y) { y = Gather(x, x) }"))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_types_that_are_no_tensors_are_refused() -> None:
    model = parse("g (float[2] x) => (seq(float[2]) y) { y = SequenceConstruct(x) }")
    with pytest.raises(ModelError, match=r"'y' is of type seq"):
        runtime.open_session(model)


# --- providers


def test_providers_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [cpu])
    assert runtime.resolve_providers("cpu") == (cpu,)
    assert runtime.resolve_providers("auto") == (cpu,)
    with pytest.raises(ProviderError, match=cuda) as caught:
        runtime.resolve_providers("cuda")
    assert "onnxruntime-gpu" in str(caught.value.hint)
    with pytest.raises(UsageError, match="unknown provider 'tpu'"):
        runtime.resolve_providers("tpu")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [cuda, cpu])
    assert runtime.resolve_providers("auto") == runtime.resolve_providers("cuda") == (cuda, cpu)


def test_a_provider_that_is_absent_is_an_error() -> None:
    settings = SessionSettings(providers=("WingedExecutionProvider",))
    with pytest.raises(ProviderError, match="WingedExecutionProvider"):
        runtime.open_session(linear(), settings)


def test_falling_back_to_another_provider_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime lists CUDA when built with it, and falls back when its libraries are missing."""
    cuda = "CUDAExecutionProvider"
    real = onnxruntime.InferenceSession

    def on_cpu(source: bytes, options: object, **_: object) -> onnxruntime.InferenceSession:
        return real(source, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: [cuda, "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", on_cpu)
    settings = SessionSettings(providers=(cuda, "CPUExecutionProvider"))
    with pytest.raises(ProviderError, match="fell back from CUDAExecutionProvider"):
        runtime.open_session(linear(), settings)


def test_versions_that_onnxruntime_reads() -> None:
    assert 8 <= runtime.MAX_IR_VERSION <= onnx.IR_VERSION
    assert runtime.reads_opset(21)
    assert not runtime.reads_opset(999)
    assert runtime.reads_opset(2, "ai.onnx.ml")
    assert not runtime.reads_opset(999, "ai.onnx.ml")


# --- the optimized graph


def convolution() -> ir.Model:
    return parse(
        """g (float[1,3,8,8] x) => (float[1,16,6,6] y)
        { [conv] a = Conv<kernel_shape=[3, 3]>(x, w) [act] y = Relu(a) }""",
        w=np.random.default_rng(0).standard_normal((16, 3, 3, 3)).astype(np.float32),
    )


def test_the_optimized_graph_shows_fusions(tmp_path: Path) -> None:
    model = convolution()
    fused = runtime.optimized_graph(model, SessionSettings(), tmp_path)
    plain = runtime.optimized_graph(model, SessionSettings(optimization=Optimization.NONE))
    assert [n.op_type for n in plain.graph] == ["Conv", "Relu"]
    assert "Relu" not in [n.op_type for n in fused.graph]
    assert {n.domain for n in fused.graph} - {""}
    assert [n.op_type for n in model.graph] == ["Conv", "Relu"]


def test_the_optimized_graph_of_a_large_model_stays_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "ONE_FILE_BYTES", 1000)
    optimized = runtime.optimized_graph(linear(), SessionSettings(), tmp_path)
    tensors = [v.const_value for v in optimized.graph.initializers.values()]
    assert [type(t) for t in tensors] == [ir.ExternalTensor]
    np.testing.assert_array_equal(tensors[0].numpy() if tensors[0] else None, WEIGHTS)


# --- time


class FakeSession(runtime.Session):
    """Takes ``cost_s`` seconds of a fake clock for each run."""

    def __init__(self, clock: list[float], cost_s: Sequence[float]) -> None:
        self.threads = 1
        self.clock, self.cost_s, self.runs = clock, cost_s, 0

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        self.clock[0] += self.cost_s[self.runs % len(self.cost_s)]
        self.runs += 1
        return {}


def test_latency_is_a_ratio_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    slow, fast = FakeSession(clock, [0.004]), FakeSession(clock, [0.0005])
    latency = runtime.compare_latency(slow, fast, {}, repeats=10)
    assert latency.ratio == pytest.approx(8)
    assert latency.ratio_low == pytest.approx(8)
    assert latency.ratio_high == pytest.approx(8)
    assert latency.a_ms == pytest.approx(4)
    assert latency.b_ms == pytest.approx(0.5)
    assert (latency.runs, latency.threads) == (10, 1)
    # 3 to warm up, 3 to calibrate, then 1 a block, and 4 (2 ms) to settle and 4 timed a block.
    assert slow.runs == 6 + 10
    assert fast.runs == 6 + 10 * 8


def test_a_slow_stretch_of_the_machine_does_not_move_the_ratio(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    slowdown = [1.0] * 16 + [5.0] * 10 + [1.0] * 14
    a = FakeSession(clock, [0.01 * s for s in slowdown])
    b = FakeSession(clock, [0.005 * s for s in slowdown])
    latency = runtime.compare_latency(a, b, {}, repeats=34)
    assert latency.ratio == pytest.approx(2)
    assert latency.ratio_high == pytest.approx(2)


def test_latency_stops_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    a, b = FakeSession(clock, [3.0]), FakeSession(clock, [2.0])
    assert runtime.compare_latency(a, b, {}, max_seconds=20).runs == 5


def test_latency_of_real_sessions() -> None:
    settings = SessionSettings(threads=1)
    a, b = (runtime.open_session(linear(), settings) for _ in range(2))
    latency = runtime.compare_latency(a, b, {"x": X}, repeats=5)
    assert 0 < latency.ratio_low <= latency.ratio <= latency.ratio_high
    assert latency.a_ms > 0
    assert latency.b_ms > 0


def test_profile_names_the_nodes(tmp_path: Path) -> None:
    settings = SessionSettings(optimization=Optimization.NONE, threads=1)
    nodes = runtime.profile_nodes(linear(), {"x": X}, settings, runs=5, work_dir=tmp_path)
    assert {(n.node, n.op_type) for n in nodes} == {("mm", "MatMul"), ("act", "Relu")}
    assert sum(n.share_ratio for n in nodes) == pytest.approx(1)
    assert nodes[0].time_ms >= nodes[1].time_ms
    assert not list(tmp_path.iterdir())


def test_profile_sums_the_rounds_of_a_loop() -> None:
    times = {("inside", "Add"): [1.0, 2.0, 3.0] * 4, ("outside", "Mul"): [9.0, 9.0, 2.0, 2.0]}
    inside, outside = runtime._shares(times, warmup=2, runs=2)
    assert (inside.node, inside.time_ms) == ("inside", 6.0)
    assert (outside.node, outside.time_ms) == ("outside", 2.0)
    assert inside.share_ratio == pytest.approx(0.75)
