"""Statistics of the augmented graph against one-shot numpy."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcompress import runtime
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.calibration.statistics import (
    AxisUnfold,
    ConvUnfold,
    CrossMomentsRequest,
    FloatArray,
    MeanRequest,
    MomentsRequest,
    RangeRequest,
    Request,
    Statistics,
    TailRequest,
)
from onnxcompress.errors import DataError, ModelError
from onnxcompress.interface import input_specs
from tests.calibration.builders import Array, gather, identity, im2col, parse, run

OPSETS = (10, 13, 18, 21)
_COLUMN = np.array([-1, 1])

few = settings(max_examples=15, deadline=None)


def _normal(*shape: int, seed: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _covariance(rows: FloatArray) -> FloatArray:
    centred = rows - rows.mean(axis=-2, keepdims=True)
    covariance: FloatArray = np.swapaxes(centred, -1, -2) @ centred / rows.shape[-2]
    return covariance


def test_tensors_that_are_infinite_can_be_left_out() -> None:
    model = parse("g (float[N, 4] x) => (float[N, 4] y, float[N, 4] z) { y = Log(x) z = Relu(x) }")
    data: dict[str, Array] = {"x": np.array([[0.5, 1, 2, 3], [0, 1, 2, 3]], np.float32)}
    wanted: list[Request] = [RangeRequest("y"), MeanRequest("y", 1), RangeRequest("z")]
    with pytest.raises(DataError, match=r"'y' \(output of Log"):
        gather(model, wanted, data, batch_size=1)
    found = gather(model, wanted, data, batch_size=1, finite_only=True)
    assert list(found) == [RangeRequest("z")]
    assert found[RangeRequest("z")].maximum == 3


@pytest.mark.parametrize("opset", OPSETS)
def test_every_statistic_in_every_operator_set(opset: int) -> None:
    model = parse(
        """g (float[N, 2, 6, 5] x) => (float[N, 3, 6, 5] z) {
            y = Conv<pads = [1, 1, 1, 1]>(x, w)
            z = Relu(y)
        }""",
        {"w": _normal(3, 2, 3, 3, seed=1)},
        opset=opset,
    )
    unfold = ConvUnfold((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    ranges, per_channel = RangeRequest("y"), RangeRequest("y", 1)
    tail, mean = TailRequest("y", 0.05), MeanRequest("y", 1)
    moments = MomentsRequest("x", unfold)
    cross = CrossMomentsRequest("x", unfold, (("y", 1.0),), 1)
    some = MomentsRequest("x", unfold, max_rows=40)
    x = _normal(7, 2, 6, 5)
    found = gather(model, [ranges, per_channel, tail, mean, moments, cross, some], {"x": x})
    model.graph.outputs.append(_named(model, "y"))
    y = run(model, {"x": x})["y"].astype(np.float64)

    assert found[ranges].minimum == y.min()
    assert found[ranges].maximum == y.max()
    assert found[ranges].count == y.size
    np.testing.assert_array_equal(found[per_channel].maximum, y.max(axis=(0, 2, 3)))
    assert found[per_channel].count == y.size // 3
    assert found[tail].low == pytest.approx(np.quantile(y, 0.05), abs=1e-6)
    assert found[tail].high == pytest.approx(np.quantile(y, 0.95), abs=1e-6)
    np.testing.assert_allclose(found[mean].mean, y.mean(axis=(0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(found[mean].variance, y.var(axis=(0, 2, 3)), rtol=1e-5)
    rows = im2col(x, unfold)
    np.testing.assert_allclose(found[moments].covariance, _covariance(rows), atol=2e-6)
    np.testing.assert_allclose(found[moments].mean, rows.mean(axis=1), atol=1e-6)
    assert found[moments].count == rows.shape[1]
    weight = np.asarray(model.graph.initializers["w"].const_value, np.float64).reshape(3, -1)
    # y = W x exactly, so Cov(x, y) = Cov(x, x) Wᵀ.
    np.testing.assert_allclose(
        found[cross].cross[0], found[cross].covariance[0] @ weight.T, atol=5e-6
    )
    np.testing.assert_allclose(found[cross].mean_y, y.mean(axis=(0, 2, 3)), atol=1e-6)
    assert found[some].count == 40 + 2  # 7 samples in batches of 3, 3, 1, each rounded up


def _named(model: ir.Model, name: str) -> ir.Value:
    return next(v for node in model.graph for v in node.outputs if v.name == name)


@few
@given(
    seed=st.integers(0, 1000),
    samples=st.integers(1, 9),
    batch_size=st.integers(1, 9),
    rank=st.integers(1, 4),
    offset=st.sampled_from([0.0, 50.0]),
)
def test_streamed_is_one_shot(
    seed: int, samples: int, batch_size: int, rank: int, offset: float
) -> None:
    random = np.random.default_rng(seed)
    shape = (samples, *random.integers(1, 5, rank - 1).tolist())
    x = (random.standard_normal(shape) + offset).astype(np.float32)
    axis = int(random.integers(-rank, rank)) if rank > 1 else None
    ranges, tail = RangeRequest("x"), TailRequest("x", float(random.uniform(0.01, 0.4)))
    found = gather(identity(rank), [ranges, tail], {"x": x}, batch_size=batch_size)
    exact = x.astype(np.float64)
    assert (found[ranges].minimum, found[ranges].maximum) == (exact.min(), exact.max())
    assert found[tail].low == pytest.approx(np.quantile(exact, tail.fraction), rel=1e-12)
    assert found[tail].high == pytest.approx(np.quantile(exact, 1 - tail.fraction), rel=1e-12)
    if axis is None or axis % rank == 0:
        return  # statistics per sample do not add up over batches
    _check_axis_statistics(x, axis, batch_size, offset)


def _check_axis_statistics(x: Array, axis: int, batch_size: int, offset: float) -> None:
    exact, others = x.astype(np.float64), tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    ranges, mean = RangeRequest("x", axis), MeanRequest("x", axis)
    moments = MomentsRequest("x", AxisUnfold(axis))
    model = identity(x.ndim)
    found = gather(model, [ranges, mean, moments], {"x": x}, batch_size=batch_size)
    rows = np.moveaxis(exact, axis, -1).reshape(-1, x.shape[axis])
    tolerance = 1e-6 * (1 + offset)
    np.testing.assert_array_equal(found[ranges].minimum, exact.min(axis=others))
    np.testing.assert_allclose(found[mean].mean, exact.mean(axis=others), atol=tolerance)
    np.testing.assert_allclose(
        found[mean].variance, exact.var(axis=others), rtol=1e-4, atol=tolerance
    )
    assert found[mean].count == found[ranges].count == len(rows)
    np.testing.assert_allclose(found[moments].mean[0], rows.mean(axis=0), atol=tolerance)
    np.testing.assert_allclose(found[moments].covariance[0], _covariance(rows), atol=tolerance)


@few
@given(data=st.data())
def test_moments_of_any_convolution(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))
    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    width = data.draw(st.integers(1, 2))

    def each(low: int, high: int, count: int = rank) -> tuple[int, ...]:
        return tuple(data.draw(st.lists(st.integers(low, high), min_size=count, max_size=count)))

    unfold = ConvUnfold(each(1, 3), each(1, 2), each(1, 2), each(0, 2, 2 * rank), groups)
    least = [(k - 1) * d + 1 for k, d in zip(unfold.kernel, unfold.dilations, strict=True)]
    lengths = [low + data.draw(st.integers(0, 3)) for low in least]
    x = _normal(data.draw(st.integers(1, 4)), groups * width, *lengths, seed=rank) + 2
    batch_size = data.draw(st.integers(1, 4))
    # More rows allowed than there are: the choice in the graph must take each once.
    everything = MomentsRequest("x", unfold, max_rows=10**6)
    moments = MomentsRequest("x", unfold)
    model = identity(rank + 2)
    if data.draw(st.booleans()):  # lengths known beforehand, or only at run time
        for value in (*model.graph.inputs, *model.graph.outputs):
            value.shape = ir.Shape(["N", groups * width, *lengths])
    found = gather(model, [moments, everything], {"x": x}, batch_size=batch_size)
    rows = im2col(x, unfold)
    for request in (moments, everything):
        assert found[request].count == rows.shape[1]
        np.testing.assert_allclose(found[request].mean, rows.mean(axis=1), atol=1e-5)
        np.testing.assert_allclose(found[request].covariance, _covariance(rows), atol=2e-5)


def test_cross_moments_with_a_reference_model_give_its_weight() -> None:
    x = _normal(12, 4, 6, 6)
    weights = {"w": _normal(6, 2, 3, 3, seed=1), "b": _normal(6, seed=2)}
    text = """g (float[N, 4, 6, 6] x) => (float[N, 6, 3, 3] y) {
        y = Conv<group = 2, pads = [1, 1, 1, 1], strides = [2, 2]>(x, w, b)
    }"""
    reference = parse(text, weights)
    changed = parse(text, {**weights, "w": weights["w"] * 0.5})
    unfold = ConvUnfold((3, 3), (2, 2), (1, 1), (1, 1, 1, 1), 2)
    cross = CrossMomentsRequest("x", unfold, (("reference/y", 2.0), ("y", -1.0)), 1)
    found = gather(changed, [cross], {"x": x}, reference=reference)[cross]
    # y = 2 (W x + b) - (W x / 2 + b) = 1.5 W x + b: least squares must find 1.5 W.
    assert found.cross.shape == (2, 18, 3)
    for group in range(2):
        solved = np.linalg.solve(found.covariance[group], found.cross[group]).T
        expected = 1.5 * weights["w"].reshape(2, 3, 18)[group]
        np.testing.assert_allclose(solved, expected, atol=1e-4)
    bias = found.mean_y.reshape(2, 3) - np.einsum(
        "god,gd->go", 1.5 * weights["w"].reshape(2, 3, 18), found.mean_x
    )
    np.testing.assert_allclose(bias.ravel(), weights["b"], atol=1e-5)


def test_equal_parts_of_the_reference_share_their_tensors() -> None:
    model = parse("g (float[N, 2] x) => (float[N, 2] y) { y = Add(x, w) }", {"w": _normal(2)})
    cross = CrossMomentsRequest("x", AxisUnfold(1), (("reference/y", 1.0), ("y", -1.0)), 1)
    found = gather(model, [cross], {"x": _normal(5, 2)}, reference=model)[cross]
    np.testing.assert_array_equal(found.cross, 0)
    assert [v.name for v in model.graph.outputs] == ["y"]  # the model itself is not touched


def test_a_reference_with_control_flow_joins() -> None:
    text = """g (bool c, float[N, 2] x) => (float[N, 2] y) {
        h = Relu(x)
        y = If(c) <then_branch = t () => (float[N, 2] a) { m = Mul(h, w) a = Neg(m) },
                   else_branch = e () => (float[N, 2] b) { b = Identity(h) }>
    }"""
    x = np.abs(_normal(4, 1, 2))
    reference = parse(text, {"w": np.array([3], np.float32)})
    changed = parse(text, {"w": np.array([2], np.float32)})
    ours, theirs = RangeRequest("y"), RangeRequest("reference/y")
    data: dict[str, Array] = {"c": np.ones(4, bool), "x": x}
    found = gather(changed, [ours, theirs], data, reference=reference)
    assert found[ours].minimum == -2 * x.max()
    assert found[theirs].minimum == -3 * x.max()


def test_a_subset_of_rows_is_seeded_and_near_the_whole() -> None:
    x = _normal(20, 3, 16, 16)
    unfold = ConvUnfold((3, 3), (1, 1), (1, 1), (0, 0, 0, 0))
    some, whole = MomentsRequest("x", unfold, 1000), MomentsRequest("x", unfold)

    def measured(seed: int) -> Statistics:
        return gather(identity(4), [some, whole], {"x": x}, seed=seed, batch_size=4)

    first, again, other = measured(0), measured(0), measured(1)
    assert first[some].count == 1000
    np.testing.assert_array_equal(first[some].covariance, again[some].covariance)
    assert not np.array_equal(first[some].covariance, other[some].covariance)
    np.testing.assert_allclose(first[some].covariance, first[whole].covariance, atol=0.2)


def test_rows_and_targets_of_a_subset_belong_together() -> None:
    unfold = ConvUnfold((1, 1), (2, 1), (1, 1), (0, 0, 0, 0))
    model = parse(
        """g (float[N, 2, 6, 4] x) => (float[N, 2, 3, 4] y) {
            y = Conv<strides = [2, 1]>(x, w)
        }""",
        {"w": np.eye(2, dtype=np.float32).reshape(2, 2, 1, 1)},
    )
    cross = CrossMomentsRequest("x", unfold, (("y", 1.0),), 1, max_rows=25)
    found = gather(model, [cross], {"x": _normal(10, 2, 6, 4)})[cross]
    np.testing.assert_allclose(found.cross, found.covariance, atol=1e-6)  # y is x


@pytest.mark.parametrize("name", ["float16", "double"])
def test_other_floating_point_types(name: str) -> None:
    dtype = np.float16 if name == "float16" else np.float64
    x = _normal(6, 2, 5).astype(dtype)
    ranges, mean, tail = RangeRequest("y"), MeanRequest("y", 1), TailRequest("y", 0.1)
    moments = MomentsRequest("y", AxisUnfold(1))
    cross = CrossMomentsRequest("y", AxisUnfold(1), (("x", 0.5),), 1)
    requests: list[Request] = [ranges, mean, tail, moments, cross]
    found = gather(identity(3, name), requests, {"x": x})
    y = 2 * x.astype(np.float64)
    assert found[ranges].maximum == y.max()
    assert found[tail].high == pytest.approx(np.quantile(y, 0.9), rel=1e-12)
    np.testing.assert_allclose(found[mean].mean, y.mean(axis=(0, 2)), atol=1e-6)
    np.testing.assert_allclose(found[cross].cross * 4, found[moments].covariance, atol=1e-5)


@pytest.mark.parametrize("name", ["int64", "int32", "uint8", "int8", "bool"])
def test_range_of_integers(name: str) -> None:
    x = np.array([[0, 1], [1, 0]]).astype(name) if name == "bool" else np.array([[5, 1], [7, 2]])
    model = parse(f"g ({name}[N, 2] x) => ({name}[N, 2] y) {{ y = Identity(x) }}")
    whole, each = RangeRequest("x"), RangeRequest("y", 1)
    found = gather(model, [whole, each], {"x": x.astype(name)}, batch_size=1)
    assert found[whole].maximum == x.max()
    np.testing.assert_array_equal(found[each].minimum, x.min(axis=0))


@pytest.mark.parametrize("length", [4, 12])
@pytest.mark.parametrize("max_rows", [None, 6])
def test_wrong_declared_shapes_are_not_relied_on(length: int, max_rows: int | None) -> None:
    model = parse("g (float[N, 2, L] x) => (float[N, 2, L] z) { y = Relu(x) z = Neg(y) }")
    _named(model, "y").shape = ir.Shape(["N", 2, 9])
    unfold = ConvUnfold((3,), (1,), (1,), (0, 0))
    request = MomentsRequest("y", unfold, max_rows)
    x = _normal(5, 2, length)
    found = gather(model, [request], {"x": x})[request]
    if max_rows is None:
        rows = im2col(np.maximum(x, 0), unfold)
        assert found.count == rows.shape[1]
        np.testing.assert_allclose(found.covariance, _covariance(rows), atol=1e-6)
    else:
        assert max_rows <= found.count <= max_rows + 2


@few
@given(
    samples=st.integers(1, 9),
    batch_size=st.integers(1, 9),
    length=st.integers(1, 8),
    max_rows=st.integers(1, 50),
    known=st.booleans(),
)
def test_the_number_of_rows_is_that_of_the_request(
    samples: int, batch_size: int, length: int, max_rows: int, known: bool
) -> None:
    model = identity(3)
    if known:
        for value in (*model.graph.inputs, *model.graph.outputs):
            value.shape = ir.Shape(["N", length, 2])
    request = MomentsRequest("x", AxisUnfold(2), max_rows)
    data = {"x": _normal(samples, length, 2)}
    found = gather(model, [request], data, batch_size=batch_size)[request]
    there, runs = samples * length, -(-samples // batch_size)
    assert min(there, max_rows) <= found.count <= min(there, max_rows + runs)


def test_whole_inputs_scalars_initializers_and_graph_inputs() -> None:
    model = parse(
        """g (float[2, 1, 3] state, int64 rate) => (float[2, 1, 3] y) {
            factor = Cast<to = 1>(rate)
            scaled = Mul(factor, w)
            y = Add(state, scaled)
        }""",
        {"w": np.array([1, 2, 3], np.float32)},
    )
    state, rate = _normal(4, 2, 1, 3), np.array([1, 2, 3, 4])
    requests = [RangeRequest(n) for n in ("state", "rate", "factor", "w")]
    found = gather(model, requests, {"state": state, "rate": rate})
    seen = [(float(found[r].minimum), float(found[r].maximum)) for r in requests]
    assert seen == [(state.min(), state.max()), (1, 4), (1, 4), (1, 3)]
    assert found.sample_count == 4


def test_missing_shapes_are_found_by_running() -> None:
    model = parse("g (float[N, 2] x) => (float[N, 2] z) { y = Relu(x) z = Neg(y) }")
    value = _named(model, "y")
    value.shape = value.type = model.graph.inputs[0].shape = None
    request, of_input = MeanRequest("y", 1), MeanRequest("x", 1)
    x = _normal(5, 2)
    found = gather(model, [request, of_input], {"x": x})
    np.testing.assert_allclose(found[request].mean, np.maximum(x, 0).mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found[of_input].mean, x.mean(axis=0), atol=1e-6)


def test_samples_of_different_sizes_still_give_exact_quantiles() -> None:
    sizes = [3, 40, 2, 7, 90]
    items = [{"x": _normal(1, n, seed=n) * n} for n in sizes]
    model = identity(2)
    request = TailRequest("x", 0.2)
    dataset = open_dataset(lambda: iter(items), input_specs(model))
    found = gather(model, [request], dataset)[request]
    everything = np.concatenate([item["x"].ravel() for item in items]).astype(np.float64)
    assert found.low == pytest.approx(np.quantile(everything, 0.2), rel=1e-12)
    assert found.high == pytest.approx(np.quantile(everything, 0.8), rel=1e-12)


def test_moments_of_samples_of_different_sizes() -> None:
    items = [{"x": _normal(1, 2, n, seed=n)} for n in (5, 5, 9, 4)]
    unfold = ConvUnfold((3,), (2,), (1,), (1, 0))
    request, some = MomentsRequest("x", unfold), MomentsRequest("x", AxisUnfold(1), 8)
    dataset = open_dataset(lambda: iter(items), input_specs(identity(3)))
    found = gather(identity(3), [request, some], dataset)
    rows = np.concatenate([im2col(item["x"], unfold) for item in items], axis=1)
    assert found[request].count == rows.shape[1]
    np.testing.assert_allclose(found[request].covariance, _covariance(rows), atol=1e-6)
    assert 8 <= found[some].count <= 11


@pytest.mark.parametrize(
    "request_",
    [
        RangeRequest("y"),
        RangeRequest("y", 1),
        TailRequest("y", 0.1),
        MeanRequest("y", 1),
        MomentsRequest("y", AxisUnfold(1)),
        CrossMomentsRequest("x", AxisUnfold(1), (("y", 1.0),), 1),
    ],
)
@pytest.mark.parametrize("bad", [-1.0, 0.0])
def test_nan_and_infinity_name_the_tensor_and_the_samples(
    request_: RangeRequest, bad: float
) -> None:
    model = parse("g (float[N, 3] x) => (float[N, 3] z) { y = Log(x) z = Neg(y) }")
    x = np.abs(_normal(8, 3)) + 1
    x[5, 1] = bad  # the logarithm is NaN or -inf
    with pytest.raises(DataError, match=r"'y' \(output of Log .* samples 3 to 5"):
        gather(model, [RangeRequest("z"), request_], {"x": x})


def test_large_finite_values_are_no_infinity() -> None:
    x = np.full((4, 6), -3.4e38, np.float32)
    x[:, 0] = 1
    request = RangeRequest("x")
    assert gather(identity(2), [request], {"x": x})[request].minimum == np.float32(-3.4e38)


def test_errors_in_requests() -> None:
    model = parse(
        """g (bool c, float[N, 2] x) => (float[N, 2] y) {
            y = If(c) <then_branch = t () => (float[N, 2] a) { inner = Neg(x) a = Neg(inner) },
                       else_branch = e () => (float[N, 2] b) { b = Identity(x) }>
        }"""
    )
    data: dict[str, Array] = {"c": np.array([True]), "x": _normal(1, 1, 2)}
    with pytest.raises(ModelError, match=r"'inner' lies in a subgraph of If"):
        gather(model, [RangeRequest("inner")], data)
    with pytest.raises(ModelError, match="no tensor 'xx'") as raised:
        gather(model, [RangeRequest("xx")], data)
    assert raised.value.hint == "Did you mean 'x'?"
    with pytest.raises(ModelError, match="2 axes, no axis 2"):
        gather(model, [MeanRequest("x", 2)], data)
    with pytest.raises(ModelError, match="2 axes, a kernel"):
        gather(model, [MomentsRequest("x", ConvUnfold((3,), (1,), (1,), (0, 0)))], data)


@pytest.mark.parametrize("max_rows", [None, 4])
def test_targets_must_have_the_rows_of_the_input(max_rows: int | None) -> None:
    model = parse("g (float[N, 3] x) => (float[M, 1] y) { y = Reshape(x, s) }", {"s": _COLUMN})
    cross = CrossMomentsRequest("x", AxisUnfold(1), (("y", 1.0),), 1, max_rows)
    with pytest.raises(ModelError, match=r"calibrate_MatMul|has 3 rows, its targets have 9"):
        gather(model, [cross], {"x": _normal(3, 3)})


def test_old_operator_sets_are_told_apart() -> None:
    model = identity(2, opset=9)
    with pytest.raises(ModelError, match="exact quantiles needs operator set 10"):
        gather(model, [TailRequest("x", 0.1)], {"x": _normal(3, 2)})
    request = RangeRequest("x")
    found = gather(identity(2, opset=7), [request], {"x": _normal(3, 2)})
    assert found[request].count == 6


def test_joining_models_that_do_not_go_together() -> None:
    request = RangeRequest("x")
    with pytest.raises(ModelError, match="operator set 13"):
        gather(identity(2), [request], {"x": _normal(3, 2)}, reference=identity(2, opset=13))
    other = parse("g (float[N, 2] u) => (float[N, 2] y) { y = Neg(u) }")
    with pytest.raises(ModelError, match="inputs that the model lacks"):
        gather(identity(2), [request], {"x": _normal(3, 2)}, reference=other)


def test_no_requests_run_nothing() -> None:
    assert len(gather(identity(1), [], {"x": _normal(3)})) == 0


def test_a_batch_without_memory_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    whole = runtime.Session.run

    def limited(
        self: runtime.Session, feeds: dict[str, Array], outputs: list[str] | None = None
    ) -> dict[str, Array]:
        sizes.append(len(feeds["x"]))
        if len(feeds["x"]) > 2:
            raise MemoryError
        return whole(self, feeds, outputs)

    monkeypatch.setattr(runtime.Session, "run", limited)
    x, request = _normal(11, 3), MeanRequest("x", 1)
    found = gather(identity(2), [request], {"x": x}, batch_size=8)
    np.testing.assert_allclose(found[request].mean, x.mean(axis=0), atol=1e-6)
    assert found[request].count == 11
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 1]


def test_a_single_sample_without_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> dict[str, Array]:
        raise MemoryError

    monkeypatch.setattr(runtime.Session, "run", failing)
    with pytest.raises(ModelError, match=r"run the model on 1 sample$"):
        gather(identity(2), [RangeRequest("x")], {"x": _normal(4, 3)}, batch_size=4)


def test_a_model_that_only_takes_one_sample_at_a_time() -> None:
    # Exported with a fixed length inside although the batch axis is dynamic.
    model = parse(
        "g (float[N, 4] x) => (float[M, 2] y) { y = Reshape(x, shape) z = Add(y, w) }",
        {"shape": np.array([1, 4]), "w": _normal(4)},
    )
    request = RangeRequest("z")
    x = _normal(6, 4)
    found = gather(model, [request], {"x": x}, batch_size=4)
    w = np.asarray(model.graph.initializers["w"].const_value)
    assert found[request].maximum == pytest.approx((x + w).max())
