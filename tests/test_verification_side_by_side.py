from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcompress import api, model_io
from onnxcompress.calibration.sources import Dataset, open_dataset
from onnxcompress.errors import DataError, ModelError, ProviderError, UsageError
from onnxcompress.inspection import inspect
from onnxcompress.interface import TensorSpec, input_specs
from onnxcompress.progress import SilentProgress, Task
from onnxcompress.runtime import Session, SessionSettings, open_session
from onnxcompress.verification.compare import compare_outputs, interface_changes
from onnxcompress.verification.footprint import load_times, peak_memory
from onnxcompress.verification.gates import Gates
from onnxcompress.verification.measure_memory import memory_bytes
from onnxcompress.verification.metrics import Array
from onnxcompress.verification.side_by_side import Verification
from tests import fakes


@pytest.fixture
def original(tmp_path: Path) -> Path:
    return fakes.save_classifier(tmp_path / "a.onnx")


def edited(original: Path, name: str = "w2", *, factor: float = 1.0, noise: float = 0.0) -> Path:
    """A copy of the model whose weight is multiplied, with noise added."""
    proto = onnx.load(original)
    for tensor in proto.graph.initializer:
        if tensor.name == name:
            array = onnx.numpy_helper.to_array(tensor)
            changed = array * factor + noise * np.random.default_rng(5).normal(size=array.shape)
            made = onnx.numpy_helper.from_array(changed.astype(np.float32), name)
            tensor.CopyFrom(made)
    path = original.with_name("b.onnx")
    onnx.save(proto, path)
    return path


def check(original: Path, result: Path, gates: Gates | None = None) -> Verification:
    return api.verify(original, result, fakes.samples(50), gates=gates, measure=False)


def test_a_model_is_like_itself(original: Path) -> None:
    checked = check(original, original)
    assert checked.passed
    assert checked.comparison.samples == 50
    (output,) = checked.comparison.outputs
    assert output.sqnr_db == math.inf
    assert checked.comparison.agreements[0].top1_ratio == 1.0
    assert checked.original.parameters == 6 * 16 + 16 + 16 * 4 + 4
    assert checked.original.macs == 6 * 16 + 16 * 4
    assert checked.original.raw_bytes == original.stat().st_size
    assert not checked.synthetic


def test_a_destroyed_model_fails_the_default_gate(original: Path) -> None:
    checked = check(original, edited(original, factor=-1))
    assert not checked.passed
    (failure,) = checked.failures
    assert failure.startswith("agreement of output 'y' is 0")


def test_gates_that_are_not_enforced_are_reported(original: Path) -> None:
    checked = check(original, edited(original, factor=-1), Gates(enforced=False))
    assert checked.passed
    assert len(checked.failures) == 1


def test_a_little_noise_passes_and_shows(original: Path) -> None:
    checked = check(original, edited(original, noise=0.01))
    assert checked.passed
    (output,) = checked.comparison.outputs
    assert output.sqnr_db is not None
    assert 20 < output.sqnr_db < 60


@pytest.mark.parametrize(
    ("gates", "passed"),
    [
        (Gates(min_sqnr_db=10), True),
        (Gates(min_sqnr_db=90), False),
        (Gates(min_cosine=0.9), True),
        (Gates(min_cosine=0.9999999), False),
        (Gates(min_agreement=0.8), True),
    ],
)
def test_gates_decide(original: Path, gates: Gates, passed: bool) -> None:
    assert check(original, edited(original, noise=0.05), gates).passed is passed


@pytest.mark.parametrize("enforced", [True, False])
def test_nan_is_fatal_even_without_gates(original: Path, enforced: bool) -> None:
    checked = check(original, edited(original, factor=math.nan), Gates(enforced=enforced))
    assert not checked.passed
    assert "NaN or infinite values where the original's are finite" in checked.failures[0]


def test_an_original_that_is_not_finite_is_no_fault_of_the_result(original: Path) -> None:
    broken = edited(original, factor=math.nan)
    checked = check(broken, broken)
    assert not checked.comparison.fatal
    assert any("original itself gives NaN" in warning for warning in checked.warnings)
    assert checked.passed
    assert not check(broken, original).passed  # finite values in place of NaN are not the same


def test_another_interface_is_fatal(original: Path) -> None:
    proto = onnx.load(original)
    proto.graph.node[-1].output[0] = "z2"
    proto.graph.output[0].name = "z2"
    result = original.with_name("b.onnx")
    onnx.save(proto, result)
    checked = check(original, result)
    assert checked.failures == ("the outputs changed from y to z2",)


def test_a_result_that_is_no_model_is_fatal(original: Path) -> None:
    result = original.with_name("b.onnx")
    result.write_bytes(original.read_bytes()[:200])
    checked = check(original, result)
    assert checked.failures[0].startswith("the result does not load")
    assert checked.result is None


def test_a_result_that_onnxruntime_refuses_is_fatal(original: Path) -> None:
    proto = onnx.load(original)
    proto.graph.node[1].op_type = "NoSuchOperator"
    result = original.with_name("b.onnx")
    onnx.save(proto, result)
    checked = check(original, result)
    assert not checked.passed
    assert checked.failures[0].startswith("the result does not load")


def test_a_result_that_does_not_run_is_fatal(original: Path) -> None:
    """A Reshape that holds for one sample only."""
    proto = onnx.load(original)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 16]), "shape"))
    proto.graph.node[2].input[0] = "flat"
    proto.graph.node.insert(
        2, onnx.helper.make_node("Reshape", ["r", "shape"], ["flat"], "reshape")
    )
    result = original.with_name("b.onnx")
    onnx.save(proto, result)
    checked = check(original, result)
    assert checked.failures[0].startswith("the result does not run")


def test_a_missing_result_is_an_error(original: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no file '.*nowhere\.onnx'"):
        check(original, original.with_name("nowhere.onnx"))


def test_labels_give_a_paired_difference(original: Path) -> None:
    data = fakes.samples(60)
    session = open_session(original, SessionSettings())
    labels = session.run({"x": data})["y"].argmax(axis=1)
    checked = api.verify(
        original,
        edited(original, noise=0.8),
        data,
        labels=labels,
        gates=Gates(max_drop=0.001),
        measure=False,
    )
    accuracy = checked.comparison.accuracy
    assert accuracy is not None
    assert accuracy.original_ratio == 1.0
    assert accuracy.result_ratio < 1.0
    assert accuracy.difference_ratio == pytest.approx(accuracy.result_ratio - 1)
    assert not checked.passed
    assert checked.failures[0].startswith("drop of output 'y'")


def test_labels_that_fit_nothing_are_said(original: Path) -> None:
    checked = api.verify(
        original, original, fakes.samples(5), labels=np.array([9] * 5), measure=False
    )
    assert any("labels fit no output" in warning for warning in checked.warnings)


def test_labels_without_data(original: Path) -> None:
    with pytest.raises(UsageError, match="labels are given without evaluation data"):
        api.verify(original, original, labels=np.zeros(3, np.int64))


def test_without_data_inputs_are_invented_and_said(original: Path) -> None:
    checked = api.verify(original, original, measure=False)
    assert checked.synthetic
    assert any("synthetic" in warning for warning in checked.warnings)


def test_data_beside_the_model_are_used(original: Path) -> None:
    fakes.save_data(original, evaluation=9)
    checked = api.verify(original, original, measure=False)
    assert checked.comparison.samples == 9
    assert "a.eval.npz" in checked.data


def test_data_that_do_not_fit(original: Path) -> None:
    with pytest.raises(DataError, match="do not fit"):
        api.verify(original, original, np.zeros((3, 5), np.float32))


def test_cuda_fails_clearly_where_it_is_absent(original: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(ProviderError, match="CUDAExecutionProvider"):
        api.verify(original, original, provider="cuda")


def test_latency_and_memory_are_measured(original: Path) -> None:
    checked = api.verify(original, original, fakes.samples(8), batch_size=4)
    assert [t.batch_size for t in checked.timings] == [1, 4]
    for timing in checked.timings:
        assert timing.threads == 1
        assert 0 < timing.speedup_low_ratio <= timing.speedup_ratio <= timing.speedup_high_ratio
    assert checked.result is not None
    for side in (checked.original, checked.result):
        assert side.peak_memory_bytes is not None
        assert 0 < side.peak_memory_bytes < 1e9


def test_peak_memory_grows_with_the_model(tmp_path: Path) -> None:
    """A weight of 64 MB needs at least 50 MB more than one of 64 kB."""
    peaks = []
    for size in (128, 4096):
        model = onnx.parser.parse_model(
            f"""
            <ir_version: 8, opset_import: ["" : 17]>
            m (float[1,{size}] x) => (float[1,{size}] y) {{ y = MatMul(x, w) }}
            """
        )
        weight = np.ones((size, size), np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
        path = tmp_path / f"{size}.onnx"
        onnx.save(model, path)
        feeds: dict[str, Array] = {"x": np.ones((1, size), np.float32)}
        peak = peak_memory(path, feeds, SessionSettings(threads=1), tmp_path)
        assert peak is not None
        peaks.append(peak)
    assert peaks[1] - peaks[0] > 50e6


def test_load_times_tell_a_file_that_computes_at_load_from_one_that_does_not(
    tmp_path: Path,
) -> None:
    paths = []
    for repeats in (1, 60):
        chain = "".join(f"w{i + 1} = MatMul(w{i}, w{i})\n" for i in range(repeats))
        model = onnx.parser.parse_model(
            f"""
            <ir_version: 8, opset_import: ["" : 17]>
            m (float[1,300] x) => (float[1,300] y) {{ {chain} y = MatMul(x, w{repeats}) }}
            """
        )
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(np.zeros((300, 300), np.float32), "w0")
        )
        paths.append(tmp_path / f"{repeats}.onnx")
        onnx.save(model, paths[-1])
    times = load_times(paths, SessionSettings(threads=1))
    assert times[paths[1]] > times[paths[0]] > 0


def test_memory_of_this_process() -> None:
    now, peak = memory_bytes(peak=False), memory_bytes(peak=True)
    assert now is not None
    assert peak is not None
    assert 1e6 < now <= peak


def test_benchmark_measures_every_batch_and_thread_count(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxcompress.verification.side_by_side.peak_memory", lambda *a: None)
    timed = api.benchmark(original, original, fakes.samples(4), threads=(1, 2), batch_sizes=(1, 2))
    assert [(t.threads, t.batch_size) for t in timed.timings] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert timed.comparison.samples == 0


def test_benchmark_needs_the_same_interface(original: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> m (float[N] x) => (float[N] y) { y = Relu(x) }'
    )
    onnx.save(model, other)
    with pytest.raises(ModelError, match="cannot be timed on the same inputs"):
        api.benchmark(original, other, fakes.samples(4))


class Greedy(Session):
    """A session for which more than two samples do not fit into memory."""

    largest = 2

    def run(self, feeds: object, outputs: object = None) -> dict[str, Array]:
        assert isinstance(feeds, dict)
        if len(feeds["x"]) > self.largest:
            raise MemoryError("bad_alloc")
        return super().run(feeds)


class Lines(SilentProgress):
    """Keeps what is logged and how far the bar went."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.steps = 0

    def log(self, message: str) -> None:
        self.lines.append(message)

    def advance(self, steps: int = 1) -> None:
        self.steps += steps

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Task]:
        assert total is not None
        self.steps = 0
        yield self
        assert self.steps <= total


def sessions(original: Path) -> tuple[Session, Greedy, Dataset]:
    plain, greedy = open_session(original), open_session(original)
    greedy.__class__ = Greedy
    assert isinstance(greedy, Greedy)
    data = open_dataset(fakes.samples(7), input_specs(model_io.load(original)))
    return plain, greedy, data


def test_a_batch_that_does_not_fit_is_halved(original: Path) -> None:
    plain, greedy, data = sessions(original)
    progress = Lines()
    found = compare_outputs(plain, greedy, data, batch_size=8, progress=progress)
    assert found.samples == 7
    assert found.outputs[0].samples == 7
    assert progress.steps == 7
    assert len(progress.lines) == 2


def test_one_sample_that_does_not_fit_is_an_error(
    original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, greedy, data = sessions(original)
    monkeypatch.setattr(Greedy, "largest", 0)
    with pytest.raises(DataError, match="not enough memory"):
        compare_outputs(plain, greedy, data, batch_size=8, progress=SilentProgress())


def spec(*shape: int | str, name: str = "x", dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name, np.dtype(dtype), shape)


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        (spec("N", 3), spec("batch", 3), True),
        (spec("N", 3), spec(1, 3), False),
        (spec(1, 3), spec("N", 3), False),
        (spec(1, 3), spec(1, 4), False),
        (spec(1, 3), spec(1, 3, 1), False),
        (spec(3), spec(3, dtype="float16"), False),
        (TensorSpec("x", np.dtype("float32"), None), spec(3), True),
        (spec(3), TensorSpec("x", np.dtype("float32"), None), False),
        (spec(3), spec(3, name="y"), False),
    ],
)
def test_interface_changes(before: TensorSpec, after: TensorSpec, same: bool) -> None:
    changes = interface_changes((before,), (after,), "input")
    assert (not changes) is same
    assert all("input" in change for change in changes)


def test_functions_count_by_what_is_in_them(tmp_path: Path) -> None:
    path = tmp_path / "functions.onnx"
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "f" : 1]>
        g (float[N,6] x, float[6,4] w) => (float[N,4] y) { y = f.Product(x, w) }
        <domain: "f", opset_import: ["" : 17]> Product (a, b) => (c)
        { m = MatMul(a, b) c = Relu(m) }"""
    )
    del proto.graph.input[1]
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((6, 4), np.float32), "w"))
    onnx.save(proto, path)
    checked = api.verify(path, path, fakes.samples(4), measure=False)
    assert (checked.original.macs, checked.original.nodes) == (24, 2)
    assert inspect(path).macs == 24


@pytest.mark.parametrize(
    ("threads", "sizes"), [((-1,), (1,)), ((99999,), (1,)), ((1,), (0,)), ((), (1,)), ((1,), ())]
)
def test_benchmarks_that_make_no_sense(
    original: Path, threads: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    with pytest.raises(UsageError):
        api.benchmark(original, original, fakes.samples(4), threads=threads, batch_sizes=sizes)


def test_an_original_that_takes_one_sample_at_a_time(tmp_path: Path) -> None:
    """Both axes are called B: a batch of two does not fit where one sample does."""
    path = tmp_path / "product.onnx"
    text = (
        '<ir_version: 8, opset_import: ["" : 17]> g (float[A,B] a, float[B,C] b) => (float[A,C] y)'
    )
    onnx.save(onnx.parser.parse_model(text + " { y = MatMul(a, b) }"), path)
    data = {"a": np.ones((4, 1), np.float32), "b": np.ones((4, 3), np.float32)}
    with pytest.raises(ModelError, match="mismatch") as caught:
        api.verify(path, path, data, batch_size=2, measure=False)
    assert "--batch-size 1" in str(caught.value.hint)
    assert api.verify(path, path, data, batch_size=1, measure=False).passed
