"""Raising the opset must not change what a model computes: old and new run on the same inputs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcompress.errors import ModelError
from onnxcompress.model_io import check, infer_shapes, name_nodes, normalize
from onnxcompress.opset import COMPATIBLE, NEWEST, OLDEST, upgrade
from onnxcompress.opset_adapters import ADAPTERS
from onnxcompress.runtime import Array, Optimization, SessionSettings, open_session

NO_OPTIMIZATION = SessionSettings(optimization=Optimization.NONE, threads=1)


def parse(opset: int, text: str) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 7, opset_import: ["" : {opset}]>\n{text}')
    model = ir.from_proto(proto)
    name_nodes(model)
    return model


# (opset, graph): inputs named x are uniform in [-2, 2), others are given by their initializers.
CASES: dict[str, tuple[int, str]] = {
    "dropout 7": (7, "g (float[2,3] x) => (float[2,3] y) { y = Dropout<ratio=0.3>(x) }"),
    "dropout 10": (10, "g (float[2,3] x) => (float[2,3] y) { y, m = Dropout<ratio=0.3>(x) }"),
    "batch normalization 7": (
        7,
        """g (float[2,3,4,4] x) => (float[2,3,4,4] y)
        <float[3] s = {1, 2, 3}, float[3] b = {0, 1, -1}, float[3] m = {0.5, 0, 1},
         float[3] v = {1, 2, 0.5}>
        { y = BatchNormalization<epsilon=0.01, momentum=0.8, spatial=1>(x, s, b, m, v) }""",
    ),
    "batch normalization 9": (
        9,
        """g (float[2,3,4,4] x) => (float[2,3,4,4] y)
        <float[3] s = {1, 2, 3}, float[3] b = {0, 1, -1}, float[3] m = {0.5, 0, 1},
         float[3] v = {1, 2, 0.5}> { y = BatchNormalization(x, s, b, m, v) }""",
    ),
    "squeeze and unsqueeze": (
        7,
        """g (float[2,1,3,1] x) => (float[2,1,3] y)
        { a = Squeeze<axes=[1, 3]>(x) y = Unsqueeze<axes=[1]>(a) }""",
    ),
    "squeeze all": (11, "g (float[2,1,3,1] x) => (float[2,3] y) { y = Squeeze(x) }"),
    "clip both": (7, "g (float[4,5] x) => (float[4,5] y) { y = Clip<min=-0.5, max=1.0>(x) }"),
    "clip max only": (7, "g (float[4,5] x) => (float[4,5] y) { y = Clip<max=1.0>(x) }"),
    "clip of half precision": (
        7,
        """g (float16[4,5] x) => (float16[4,5] y)
        { y = Clip<min=-0.5, max=1.0>(x) }""",
    ),
    "clip 6": (10, "g (float[4,5] x) => (float[4,5] y) { y = Clip<min=0.0>(x) }"),
    "upsample nearest": (
        7,
        """g (float[1,2,3,4] x) => (float[1,2,6,12] y)
        { y = Upsample<mode="nearest", scales=[1.0, 1.0, 2.0, 3.0]>(x) }""",
    ),
    "upsample linear": (
        7,
        """g (float[1,2,3,4] x) => (float[1,2,6,8] y)
        { y = Upsample<mode="linear", scales=[1.0, 1.0, 2.0, 2.0]>(x) }""",
    ),
    "upsample 9": (
        9,
        """g (float[1,2,3,4] x) => (float[1,2,4,10] y) <float[4] s = {1.0, 1.0, 1.5, 2.5}>
        { y = Upsample<mode="nearest">(x, s) }""",
    ),
    "resize 10 nearest up": (
        10,
        """g (float[1,2,3,5] x) => (float[1,2,5,8] y) <float[4] s = {1.0, 1.0, 1.7, 1.7}>
        { y = Resize<mode="nearest">(x, s) }""",
    ),
    "resize 10 nearest down": (
        10,
        """g (float[1,2,9,7] x) => (float[1,2,5,4] y) <float[4] s = {1.0, 1.0, 0.6, 0.6}>
        { y = Resize<mode="nearest">(x, s) }""",
    ),
    "resize 10 linear": (
        10,
        """g (float[1,2,3,5] x) => (float[1,2,6,10] y) <float[4] s = {1.0, 1.0, 2.0, 2.0}>
        { y = Resize<mode="linear">(x, s) }""",
    ),
    "resize 11 sizes": (
        11,
        """g (float[1,2,3,5] x) => (float[1,2,4,9] y)
        <float[0] r = {}, float[0] s = {}, int64[4] n = {1, 2, 4, 9}>
        { y = Resize<mode="linear", coordinate_transformation_mode="align_corners">
              (x, r, s, n) }""",
    ),
    "pad": (
        7,
        """g (float[2,3] x) => (float[4,6] y)
        { y = Pad<mode="constant", pads=[1, 2, 1, 1], value=0.5>(x) }""",
    ),
    "pad zero": (7, "g (float[2,3] x) => (float[3,4] y) { y = Pad<pads=[1, 0, 0, 1]>(x) }"),
    "pad reflect": (
        10,
        'g (float[3,4] x) => (float[5,6] y) { y = Pad<mode="reflect", pads=[1, 1, 1, 1]>(x) }',
    ),
    "slice": (
        7,
        """g (float[4,6,5] x) => (float[2,6,4] y)
        { y = Slice<axes=[0, 2], starts=[1, -5], ends=[3, -1]>(x) }""",
    ),
    "slice all axes": (
        9,
        """g (float[4,6] x) => (float[2,4] y)
        { y = Slice<starts=[1, 2], ends=[3, 9223372036854775807]>(x) }""",
    ),
    "top k": (
        7,
        "g (float[4,6] x) => (float[4,2] y, int64[4,2] i) { y, i = TopK<axis=1, k=2>(x) }",
    ),
    "reduce sum": (
        7,
        "g (float[2,3,4] x) => (float[2,1,4] y) { y = ReduceSum<axes=[1], keepdims=1>(x) }",
    ),
    "reduce sum of all": (11, "g (float[2,3] x) => (float y) { y = ReduceSum<keepdims=0>(x) }"),
    "reduce the rest": (
        11,
        """g (float[2,3,4] x) => (float[2,3] a, float[3,1] b, float[1,3,4] c, float d)
        { a = ReduceMean<axes=[2], keepdims=0>(x)
          m = ReduceMax<axes=[-1], keepdims=1>(x) b = ReduceMin<axes=[0], keepdims=0>(m)
          c = ReduceL2<axes=[0]>(x) d = ReduceProd<keepdims=0>(x) }""",
    ),
    "softmax over everything after the batch": (
        7,
        "g (float[2,3,4,5] x) => (float[2,3,4,5] y) { y = Softmax(x) }",
    ),
    "softmax in the middle": (
        11,
        "g (float[2,3,4,5] x) => (float[2,3,4,5] y) { y = Softmax<axis=2>(x) }",
    ),
    "softmax last": (11, "g (float[2,3,4] x) => (float[2,3,4] y) { y = Softmax<axis=2>(x) }"),
    "softmax negative": (11, "g (float[2,3,4] x) => (float[2,3,4] y) { y = Softmax<axis=-2>(x) }"),
    "softmax before ones": (7, "g (float[2,3,1,1] x) => (float[2,3,1,1] y) { y = Softmax(x) }"),
    "softmax of dynamic sizes": (
        7,
        """g (float[N,3,H,W] x) => (float[N,3,H,W] y)
        { a = Softmax(x) y = Relu(a) }""",
    ),
    "log softmax": (9, "g (float[2,3,4] x) => (float[2,3,4] y) { y = LogSoftmax(x) }"),
    "hardmax": (7, "g (float[2,3,4] x) => (float[2,3,4] y) { y = Hardmax(x) }"),
    "softmax read twice": (
        7,
        """g (float[2,3,4] x) => (float[2,3,4] y, float[2,3,4] z)
        { y = Softmax(x) z = Exp(y) }""",
    ),
    "split in parts": (
        7,
        """g (float[2,6] x) => (float[2,2] a, float[2,4] b)
        { a, b = Split<axis=1, split=[2, 4]>(x) }""",
    ),
    "split evenly": (
        7,
        "g (float[2,6] x) => (float[2,3] a, float[2,3] b) { a, b = Split<axis=1>(x) }",
    ),
    "gather and scatter": (
        9,
        """g (float[3,3] x) => (float[3,3] y)
        <int64[2,3] i = {1, 0, 2, 0, 2, 1}, float[2,3] u = {9, 8, 7, 6, 5, 4}>
        { y = Scatter<axis=0>(x, i, u) }""",
    ),
    "roi align": (
        10,
        """g (float[1,1,8,8] x) => (float[2,1,3,3] y)
        <float[2,4] r = {0, 0, 6, 6, 2, 1, 7, 5}, int64[2] b = {0, 0}>
        { y = RoiAlign<output_height=3, output_width=3, spatial_scale=0.9>(x, r, b) }""",
    ),
    "grid sample": (
        16,
        """g (float[1,1,4,4] x) => (float[1,1,2,2] y)
        <float[1,2,2,2] p = {-0.5, 0.2, 0.1, 0.9, -1, -1, 0.3, 0.4}>
        { y = GridSample<mode="bilinear">(x, p) }""",
    ),
    "dft": (
        17,
        "g (float[1,4,6,2] x) => (float[1,4,6,2] y) { y = DFT(x) }",
    ),
    "group normalization": (
        18,
        """g (float[2,4,3,3] x) => (float[2,4,3,3] y) <float[2] s = {1, 2}, float[2] b = {0.5, 0}>
        { y = GroupNormalization<num_groups=2>(x, s, b) }""",
    ),
    "quantize": (
        10,
        """g (float[2,3] x) => (float[2,3] y) <float s = {0.1}, uint8 z = {128}>
        { a = QuantizeLinear(x, s, z) y = DequantizeLinear(a, s, z) }""",
    ),
    "average pool": (
        7,
        """g (float[1,2,5,5] x) => (float[1,2,3,3] y)
        { y = AveragePool<kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]>(x) }""",
    ),
    "branches": (
        11,
        """g (float[2,1,3] x) => (float[2,3] y) {
          s = ReduceSum<keepdims=0>(x)
          zero = Constant<value = float {0.0}>()
          c = Greater(s, zero)
          y = If(c) <
            then_branch = t () => (float[2,3] p)
              { a = Squeeze<axes=[1]>(x) p = Softmax<axis=0>(a) },
            else_branch = e () => (float[2,3] q) { q = Squeeze<axes=[1]>(x) }>
        }""",
    ),
}


def inputs_of(model: ir.Model, seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    feeds = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        shape = [d if isinstance(d, int) else 2 + len(str(d)) for d in value.shape]
        assert value.dtype is not None
        feeds[value.name or ""] = rng.uniform(-2, 2, shape).astype(value.dtype.numpy())
    return feeds


@pytest.mark.parametrize(
    ("case", "target"),
    [(name, target) for name in CASES for target in (13, 18, 21) if CASES[name][0] < target],
)
def test_outputs_stay_the_same(case: str, target: int) -> None:
    opset, text = CASES[case]
    original, model = parse(opset, text), parse(opset, text)
    infer_shapes(model)
    upgrade(model, target)
    infer_shapes(model)
    check(model)

    assert model.opset_imports[""] == target
    assert [v.name for v in model.graph.outputs] == [v.name for v in original.graph.outputs]
    before = open_session(original, NO_OPTIMIZATION)
    for settings in (NO_OPTIMIZATION, SessionSettings(threads=1)):
        after = open_session(model, settings)
        for seed in (0, 1):
            feeds = inputs_of(original, seed)
            expected, seen = before.run(feeds), after.run(feeds)
            assert list(seen) == list(expected)
            for name, array in expected.items():
                a, b = seen[name].astype(np.float64), array.astype(np.float64)
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


REFUSED: dict[str, tuple[int, int, str, str]] = {
    "statistics per element": (
        7,
        13,
        """g (float[1,2] x) => (float[1,2] y)
        <float[2] s = {1, 1}, float[2] b = {0, 0}, float[2] m = {0, 0}, float[2] v = {1, 1}>
        { y = BatchNormalization<spatial=0>(x, s, b, m, v) }""",
        "spatial=0",
    ),
    "mask of dropout": (
        7,
        13,
        "g (float[2] x) => (float[2] y, float[2] m) { y, m = Dropout(x) }",
        "mask",
    ),
    "removed coordinate mode": (
        11,
        13,
        """g (float[1,1,2,2] x) => (float[1,1,4,4] y)
        <float[0] r = {}, float[4] s = {1, 1, 2, 2}>
        { y = Resize<coordinate_transformation_mode="tf_half_pixel_for_nn">(x, r, s) }""",
        "tf_half_pixel_for_nn",
    ),
    "scales both ways": (
        10,
        13,
        """g (float[1,1,4,4] x) => (float[1,1,2,8] y) <float[4] s = {1, 1, 0.5, 2}>
        { y = Resize<mode="nearest">(x, s) }""",
        "shrink one axis and grow another",
    ),
    "computed scales": (
        10,
        13,
        """g (float[1,1,4,4] x, float[4] s) => (float[1,1,a,b] y)
        { y = Resize<mode="nearest">(x, s) }""",
        "computed while running",
    ),
    "padding in partial windows": (
        13,
        19,
        """g (float[1,1,5,5] x) => (float[1,1,3,3] y)
        { y = AveragePool<kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1,
                          count_include_pad=1, pads=[0, 0, 1, 1]>(x) }""",
        "partial windows",
    ),
    "no such operator": (
        7,
        13,
        "g (float[2] x) => (float[2] y) { y = Frobnicate(x) }",
        "no such operator",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_equivalent_is_refused_and_named(case: str) -> None:
    opset, target, text, reason = REFUSED[case]
    model = parse(opset, text)
    with pytest.raises(ModelError, match=reason) as caught:
        upgrade(model, target)
    node = next(iter(model.graph))
    assert f"'{node.name}'" in caught.value.message
    assert caught.value.hint


def test_a_refused_upgrade_leaves_the_model_as_it_was() -> None:
    opset, target, text, _ = REFUSED["scales both ways"]
    model = parse(opset, text)
    (note,) = normalize(model, min_opset=target)
    assert model.opset_imports[""] == opset
    assert f"stays at {opset}" in note
    open_session(model)


def test_every_operator_that_changed_is_in_exactly_one_table() -> None:
    changed: set[str] = set()
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and OLDEST < schema.since_version <= NEWEST:
            try:
                onnx.defs.get_schema(schema.name, schema.since_version - 1)
            except onnx.defs.SchemaError:
                continue  # New in that version: there is no older node to raise.
            changed.add(schema.name)
    assert changed <= COMPATIBLE | ADAPTERS.keys()
    assert not COMPATIBLE & ADAPTERS.keys()


def test_versions_out_of_range_are_refused() -> None:
    model = parse(13, "g (float[2] x) => (float[2] y) { y = Relu(x) }")
    with pytest.raises(ModelError, match="cannot be raised to 22"):
        upgrade(model, 22)


def test_nodes_of_other_domains_are_left_alone() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 7, opset_import: ["" : 10, "vendor" : 3]>
        g (float[2] x) => (float[2] y) { a = vendor.Clip<min=0.0>(x) y = Clip<min=0.0>(a) }"""
    )
    model = ir.from_proto(proto)
    name_nodes(model)
    infer_shapes(model)
    upgrade(model, 13)
    custom, clip = list(model.graph)
    assert "min" in custom.attributes
    assert len(custom.inputs) == 1
    assert "min" not in clip.attributes
    assert len(clip.inputs) == 2
    assert model.opset_imports == {"": 13, "vendor": 3}
