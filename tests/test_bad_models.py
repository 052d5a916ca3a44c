"""Every model that cannot be used is refused by a ModelError that says what is wrong and where."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxcompress import model_io, runtime
from onnxcompress.errors import ModelError

Edit = Callable[[onnx.ModelProto], None]


def linear(opset: int = 17, ir_version: int = 8) -> onnx.ModelProto:
    """x [N, 4] -> Relu(x W + b), W [4, 300] so that it is stored as raw data."""
    proto = onnx.parser.parse_model(
        f"""<ir_version: {ir_version}, opset_import: ["" : {opset}]>
        g (float[N,4] x) => (float[N,300] y)
        {{ [product] a = MatMul(x, w) [sum] s = Add(a, b) [act] y = Relu(s) }}"""
    )
    rng = np.random.default_rng(0)
    for name, shape in (("w", (4, 300)), ("b", (300,))):
        array = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return proto


def written(folder: Path, proto: onnx.ModelProto, name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


def refused(path: Path, *words: str) -> ModelError:
    with pytest.raises(ModelError) as caught:
        model_io.load(path)
    error = caught.value
    for word in (*words, path.name):
        assert word in error.message, error.message
    assert error.exit_code == 3
    return error


def test_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.onnx", "there is no file")


def test_folder_says_what_is_in_it(tmp_path: Path) -> None:
    written(tmp_path, linear(), "inside.onnx")
    assert "inside.onnx" in str(refused(tmp_path, "is a folder").hint)


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "empty.onnx"
    path.touch()
    refused(path, "is empty")


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator reads every file")
def test_unreadable_file(tmp_path: Path) -> None:
    path = written(tmp_path, linear())
    path.chmod(0)
    refused(path, "cannot read")


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"PK\x03\x04" + bytes(100), "zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"\x1c\x00\x00\x00TFL3" + bytes(100), "TensorFlow Lite"),
        (b"\x00\x00\x00\x00ORTM" + bytes(100), ".ort model"),
        (b"<!DOCTYPE html><html>404</html>", "HTML"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (b'{"irVersion": "8"}', "JSON"),
        (b"just some words, no model at all", "not an ONNX model, or is truncated"),
    ],
)
def test_other_formats_are_recognized(tmp_path: Path, head: bytes, kind: str) -> None:
    path = tmp_path / "other.onnx"
    path.write_bytes(head)
    refused(path, kind)


def test_the_extension_does_not_matter(tmp_path: Path) -> None:
    assert len(model_io.load(written(tmp_path, linear(), "model.bin")).graph) == 3


def test_truncated_anywhere(tmp_path: Path) -> None:
    whole = linear().SerializeToString()
    path = tmp_path / "cut.onnx"
    for length in range(1, len(whole), 37):
        path.write_bytes(whole[:length])
        refused(path)


def test_damaged_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    """Flip bytes everywhere: the model loads (a weight changed) or is refused by a ModelError."""
    whole = linear().SerializeToString()
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.onnx"
    outcomes = {"loaded": 0, "refused": 0}
    structure = [i for i in range(len(whole)) if i < 150 or i > len(whole) - 150]
    for position in structure:
        damaged = bytearray(whole)
        damaged[position] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            model_io.normalize(model_io.load(path))
            outcomes["loaded"] += 1
        except ModelError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 100
    assert outcomes["loaded"] > 0


def test_initializer_of_the_wrong_size(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.initializer[0].raw_data = proto.graph.initializer[0].raw_data[:-4]
    refused(written(tmp_path, proto), "'w'", "float[4, 300]", "needs 4800 bytes and has 4796")


def test_unknown_element_type(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.initializer[0].data_type = 99
    refused(written(tmp_path, proto), "'w'", "element type")


def test_negative_initializer_shape(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.initializer[0].dims[0] = -4
    refused(written(tmp_path, proto), "'w'", "negative")


def test_cyclic_graph(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y)
        { [first] a = Add(x, c) [second] b = Relu(a) [third] c = Neg(b) [last] y = Exp(c) }"""
    )
    refused(written(tmp_path, proto), "cyclic", "'first'", "'second'", "'third'")


def test_cycle_through_a_subgraph(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[2] x, bool c) => (float[2] y)
        {
          [branch] a = If(c) <then_branch = t () => (float[2] p) { p = Relu(b) },
                              else_branch = e () => (float[2] q) { q = Relu(x) }>
          [after] b = Neg(a)
          y = Exp(b)
        }"""
    )
    refused(written(tmp_path, proto), "cyclic", "'branch'", "'after'")


def test_value_defined_twice(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.node[1].output[0] = "a"
    refused(written(tmp_path, proto), "'a'", "defined twice", "'product'", "'sum'")


def test_value_shadowing_an_input(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.node[0].output[0] = "x"
    refused(written(tmp_path, proto), "'x'", "defined twice", "'product'")


def test_two_initializers_of_one_name(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.initializer[1].name = "w"
    refused(written(tmp_path, proto), "two initializers named 'w'")


def test_value_that_nothing_defines(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.node[1].input[1] = "ghost"
    refused(written(tmp_path, proto), "Add node 'sum'", "'ghost'")


def test_output_that_nothing_defines(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.output[0].name = "ghost"
    refused(written(tmp_path, proto), "graph output 'ghost'")


def test_missing_value_inside_a_branch(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[2] x, bool c) => (float[2] y)
        { y = If(c) <then_branch = t () => (float[2] p) { [inner] p = Relu(ghost) },
                     else_branch = e () => (float[2] q) { q = Relu(x) }> }"""
    )
    refused(written(tmp_path, proto), "Relu node 'inner'", "'ghost'")


def test_unknown_attribute_is_invalid(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.node[2].attribute.append(helper.make_attribute("wings", 2))
    refused(written(tmp_path, proto), "not valid ONNX", "wings")


def test_too_few_inputs_is_invalid(tmp_path: Path) -> None:
    proto = linear()
    del proto.graph.node[1].input[1:]
    refused(written(tmp_path, proto), "not valid ONNX", "Add")


def test_domain_without_an_opset(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.node[2].domain = "vendor"
    refused(written(tmp_path, proto), "vendor")


def test_opset_too_new(tmp_path: Path) -> None:
    proto = linear()
    proto.opset_import[0].version = 999
    error = refused(written(tmp_path, proto), "ai.onnx 999", "too new", "onnxruntime")
    assert "older opset" in str(error.hint)


def test_opset_too_old(tmp_path: Path) -> None:
    refused(written(tmp_path, linear(opset=6)), "opset is 6")


def test_ir_version_too_new(tmp_path: Path) -> None:
    newer = runtime.MAX_IR_VERSION + 1
    error = refused(written(tmp_path, linear(ir_version=newer)), f"IR version is {newer}")
    assert "ir_version" in str(error.hint)


def test_ir_version_too_old(tmp_path: Path) -> None:
    refused(written(tmp_path, linear(ir_version=2)), "IR version is 2")


def test_no_opset_at_all(tmp_path: Path) -> None:
    proto = linear()
    del proto.opset_import[:]
    refused(written(tmp_path, proto), "imports no operator set")


def test_training_information_is_refused(tmp_path: Path) -> None:
    proto = linear()
    proto.training_info.add().algorithm.name = "step"
    assert "inference" in str(refused(written(tmp_path, proto), "training_info").hint)


def test_sparse_indices_out_of_range(tmp_path: Path) -> None:
    proto = linear()
    values = helper.make_tensor("s", TensorProto.FLOAT, [2], [1.0, 2.0])
    indices = helper.make_tensor("s_indices", TensorProto.INT64, [2], [0, 99])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [3, 3]))
    refused(written(tmp_path, proto), "sparse tensor 's'", "[3, 3]")


def external(folder: Path, location: str, *, size: int | None = None) -> onnx.ModelProto:
    """The linear model with ``w`` in ``location``; its 4,800 bytes go to weights.bin."""
    proto = linear()
    tensor = proto.graph.initializer[0]
    (folder / "weights.bin").write_bytes(tensor.raw_data[: size if size is not None else None])
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "4800")):
        tensor.external_data.add(key=key, value=value)
    return proto


def test_external_data_that_is_missing(tmp_path: Path) -> None:
    refused(written(tmp_path, external(tmp_path, "gone.bin")), "gone.bin", "'w'", "is missing")


def test_external_data_that_is_too_short(tmp_path: Path) -> None:
    proto = external(tmp_path, "weights.bin", size=4000)
    refused(written(tmp_path, proto), "'w'", "too short", "4800", "4000")


def test_external_reference_of_the_wrong_length(tmp_path: Path) -> None:
    proto = external(tmp_path, "weights.bin")
    proto.graph.initializer[0].external_data[2].value = "400"
    refused(written(tmp_path, proto), "'w'", "needs 4800 bytes", "400")


@pytest.mark.parametrize("field", [1, 2])
def test_external_reference_that_is_no_number(tmp_path: Path, field: int) -> None:
    proto = external(tmp_path, "weights.bin")
    proto.graph.initializer[0].external_data[field].value = "many"
    refused(written(tmp_path, proto), "'w'", "no number")


@pytest.mark.parametrize("location", ["../weights.bin", "a/../../weights.bin"])
def test_external_data_outside_by_dots(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    refused(written(folder, external(tmp_path, location)), location, "by '..'", "not read")


def test_external_data_by_an_absolute_path(tmp_path: Path) -> None:
    location = str(tmp_path / "weights.bin")
    refused(written(tmp_path, external(tmp_path, location)), location, "absolute path")


def test_external_data_without_a_location(tmp_path: Path) -> None:
    refused(written(tmp_path, external(tmp_path, "")), "'w'", "no file name")


def test_external_data_behind_a_link_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
    error = refused(written(folder, external(tmp_path, "link.bin")), "symbolic link", "not read")
    assert "a copy of the data file" in str(error.hint)


def test_external_data_behind_a_linked_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "sub").symlink_to(tmp_path)
    refused(written(folder, external(tmp_path, "sub/weights.bin")), "symbolic link")


def test_external_data_with_a_second_hard_link(tmp_path: Path) -> None:
    proto = external(tmp_path, "weights.bin")
    os.link(tmp_path / "weights.bin", tmp_path / "other.bin")
    refused(written(tmp_path, proto), "hard links")


def test_a_link_inside_of_the_folder_is_fine(tmp_path: Path) -> None:
    proto = external(tmp_path, "link.bin")
    (tmp_path / "link.bin").symlink_to("weights.bin")
    model = model_io.load(written(tmp_path, proto))
    weights = model.graph.initializers["w"].const_value
    assert weights is not None
    np.testing.assert_array_equal(
        weights.numpy(), onnx.numpy_helper.to_array(linear().graph.initializer[0])
    )


def test_model_and_data_linked_from_one_store(tmp_path: Path) -> None:
    """The layout of model hubs: a folder of links into a folder of blobs."""
    store, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    store.mkdir()
    snapshot.mkdir()
    path = written(store, external(store, "data"), "0a1b")
    (store / "weights.bin").rename(store / "2c3d")
    (snapshot / "model.onnx").symlink_to(path)
    (snapshot / "data").symlink_to(store / "2c3d")
    model = model_io.load(snapshot / "model.onnx")
    feeds = {"x": np.ones((2, 4), np.float32)}
    expected = runtime.open_session(snapshot / "model.onnx").run(feeds)
    np.testing.assert_array_equal(runtime.open_session(model).run(feeds)["y"], expected["y"])


@pytest.mark.parametrize("where", ["memory", "file"])
def test_unknown_operators_are_named(tmp_path: Path, where: str) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "vendor" : 2]>
        g (float[2] x) => (float[2] y)
        { [one] a = vendor.Wobble(x) [two] b = vendor.Wobble(a) [three] y = vendor.Wave(b) }"""
    )
    path = written(tmp_path, proto)
    model = model_io.load(path)
    model_io.normalize(model)
    assert [n.domain for n in model.graph] == ["vendor"] * 3
    with pytest.raises(ModelError) as caught:
        runtime.open_session(model if where == "memory" else path)
    assert "vendor::Wobble (node 'one')" in caught.value.message
    assert "vendor::Wave (node 'three')" in caught.value.message
    assert "'two'" not in caught.value.message
    assert "custom operators" in str(caught.value.hint)


def test_shapes_that_contradict_each_other(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[2,3] x, float[4,5] z) => (float[2,5] y) { [mm] y = MatMul(x, z) }"""
    )
    path = written(tmp_path, proto)
    with pytest.raises(ModelError, match="mm"):
        runtime.open_session(path)


def test_functions_that_call_each_other(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "f" : 1]>
        g (float[2] x) => (float[2] y) { y = f.A(x) }
        <domain: "f", opset_import: ["" : 17, "f" : 1]> A (p) => (q) { q = f.B(p) }
        <domain: "f", opset_import: ["" : 17, "f" : 1]> B (p) => (q) { q = f.A(p) }"""
    )
    refused(written(tmp_path, proto), "not valid ONNX", "f::A", "f::B")


def test_functions_of_another_opset(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "f" : 1]>
        g (float[2] x) => (float[2] y) { y = f.A(x) }
        <domain: "f", opset_import: ["" : 18]> A (p) => (q) { q = Relu(p) }"""
    )
    model = model_io.load(written(tmp_path, proto))
    with pytest.raises(ModelError, match="cannot be inlined") as caught:
        model_io.normalize(model)
    assert "18" in caught.value.message


def test_a_graph_without_outputs(tmp_path: Path) -> None:
    proto = linear()
    del proto.graph.output[:]
    refused(written(tmp_path, proto), "no outputs")


@pytest.mark.parametrize("version", [0, -3])
def test_an_opset_that_never_was(tmp_path: Path, version: int) -> None:
    proto = linear()
    proto.opset_import[0].version = version
    refused(written(tmp_path, proto), f"opset is {version}", "promises nothing below")


def test_an_output_of_unknown_rank_is_fine(tmp_path: Path) -> None:
    proto = linear()
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    model = model_io.load(written(tmp_path, proto))
    assert model.graph.outputs[0].shape is None
    model_io.normalize(model)
    model_io.check(model)
    model_io.save(model, tmp_path / "saved.onnx")
    feeds = {"x": np.ones((2, 4), np.float32)}
    assert runtime.open_session(tmp_path / "saved.onnx").run(feeds)["y"].shape == (2, 300)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such files")
def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    refused(tmp_path / "pipe.onnx", "not a regular file")
    (tmp_path / "loop.onnx").symlink_to("loop.onnx")
    refused(tmp_path / "loop.onnx")


def test_a_link_to_a_model_whose_data_is_not_beside_the_link(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    path = written(tmp_path / "store", external(tmp_path / "store", "weights.bin"))
    link = tmp_path / "link.onnx"
    link.symlink_to(path)
    error = refused(link, "not beside the link")
    assert str(path) in str(error.hint)


def test_nodes_of_one_name_get_a_hint_when_run(tmp_path: Path) -> None:
    proto = linear()
    for node in proto.graph.node:
        node.name = "same"
    path = written(tmp_path, proto)
    assert len({node.name for node in model_io.load(path).graph}) == 3
    with pytest.raises(ModelError, match="same node name") as caught:
        runtime.open_session(path)
    assert caught.value.hint == "Give every node a name of its own."
