"""Loading, normalizing and saving: what goes in comes out, and files are whole or untouched."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcompress import _serialize, model_io
from onnxcompress.errors import OutputError
from onnxcompress.runtime import MAX_IR_VERSION, Array, open_session

HEADER = '<ir_version: 8, opset_import: ["" : 17]>'
WEIGHTS = np.random.default_rng(0).standard_normal((4, 300)).astype(np.float32)


def load_text(folder: Path, text: str, **initializers: Array) -> ir.Model:
    proto = onnx.parser.parse_model(text)
    for name, array in initializers.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return load_proto(folder, proto)


def load_proto(folder: Path, proto: onnx.ModelProto) -> ir.Model:
    path = folder / "in.onnx"
    path.write_bytes(proto.SerializeToString())
    return model_io.load(path)


def linear(folder: Path) -> ir.Model:
    text = HEADER + "g (float[N,4] x) => (float[N,300] y) { a = MatMul(x, w) y = Relu(a) }"
    return load_text(folder, text, w=WEIGHTS)


def outputs(model: ir.Model | Path, *feeds: Array) -> list[Array]:
    session = open_session(model)
    return list(
        session.run(dict(zip((s.name for s in session.inputs), feeds, strict=True))).values()
    )


def assert_close(seen: Array, expected: Array) -> None:
    a, b = seen.astype(np.float64), expected.astype(np.float64)
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- loading


def test_nodes_get_unique_names_in_subgraphs_too(tmp_path: Path) -> None:
    model = load_text(
        tmp_path,
        HEADER
        + """g (float[2] x, bool c) => (float[2] y) {
            [same] a = Relu(x) [same] b = Relu(a) d = Relu(b) [Relu_0] e = Relu(d)
            [choice] y = If(c) <then_branch = t () => (float[2] p) { [same] p = Relu(e) },
                                else_branch = f () => (float[2] q) { q = Neg(e) }>
        }""",
    )
    names = [node.name for node in model.graph.all_nodes()]
    assert len(names) == len(set(names)) == 7
    assert all(names)
    assert names[0] == "same"
    assert "Relu_0" in names


def test_nodes_may_come_in_any_order(tmp_path: Path) -> None:
    model = load_text(
        tmp_path, HEADER + "g (float[2] x) => (float[2] y) { y = Neg(b) b = Exp(a) a = Relu(x) }"
    )
    assert [node.op_type for node in model.graph] == ["Relu", "Exp", "Neg"]


@pytest.mark.parametrize("layout", ["linear", "coordinates"])
def test_sparse_initializers_become_dense(tmp_path: Path, layout: str) -> None:
    proto = onnx.parser.parse_model(
        HEADER + "g (float[2,3] x) => (float[2,4] y) { y = MatMul(x, s) }"
    )
    dense = np.zeros((3, 4), np.float32)
    dense[0, 1], dense[2, 3] = 5, 7
    linear_indices, coordinates = np.array([1, 11]), np.array([[0, 1], [2, 3]])
    indices = linear_indices if layout == "linear" else coordinates
    proto.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            numpy_helper.from_array(np.array([5, 7], np.float32), "s"),
            numpy_helper.from_array(indices, "s_indices"),
            [3, 4],
        )
    )
    model = load_proto(tmp_path, proto)
    value = model.graph.initializers["s"].const_value
    assert value is not None
    np.testing.assert_array_equal(value.numpy(), dense)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(outputs(model, x)[0], x @ dense)


def test_sparse_constants_become_dense(tmp_path: Path) -> None:
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.array([5, 7], np.float32), "s"),
        numpy_helper.from_array(np.array([0, 2]), "s_indices"),
        [3],
    )
    nodes = [
        helper.make_node("Constant", [], ["s"], sparse_value=sparse),
        helper.make_node("Add", ["x", "s"], ["y"]),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, [3])], [info("y", TensorProto.FLOAT, [3])]
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = load_proto(tmp_path, proto)
    model_io.normalize(model)
    np.testing.assert_array_equal(outputs(model, np.ones(3, np.float32))[0], [6, 1, 8])


def test_negative_dimensions_are_dynamic(tmp_path: Path) -> None:
    """-1 as a length would be taken for one by shape inference, and make the file unloadable."""
    model = load_text(
        tmp_path,
        HEADER
        + """g (float[-1,3,-1,-1] x) => (float[-1,3] y) {
            a = Conv<kernel_shape = [3, 3], strides = [2, 2]>(x, w) b = GlobalAveragePool(a)
            s = Shape(b) n = Gather(s, zero) m = Concat<axis=0>(n, three) y = Reshape(b, m) }""",
        w=np.ones((3, 3, 3, 3), np.float32),
        zero=np.array([0]),
        three=np.array([3]),
    )
    model_io.normalize(model)
    shape = model.graph.inputs[0].shape
    assert shape is not None
    assert [isinstance(d, int) for d in shape] == [False, True, False, False]
    (y,) = outputs(model, np.ones((2, 3, 9, 9), np.float32))
    np.testing.assert_array_equal(y, np.full((2, 3), 27.0))


def test_external_data_stays_on_disk(tmp_path: Path) -> None:
    model_io.save(linear(tmp_path), tmp_path / "out.onnx", external_data=True)
    model = model_io.load(tmp_path / "out.onnx")
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert not tensor.numpy().flags.writeable
    np.testing.assert_array_equal(tensor.numpy(), WEIGHTS)


def test_ai_onnx_is_the_standard_domain(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(HEADER + "g (float[2] x) => (float[2] y) { y = Relu(x) }")
    proto.opset_import[0].domain = "ai.onnx"
    proto.graph.node[0].domain = "ai.onnx"
    model = load_proto(tmp_path, proto)
    assert model.opset_imports == {"": 17}
    assert next(iter(model.graph)).domain == ""


# --- normalizing


def test_constants_become_initializers_in_branches_too(tmp_path: Path) -> None:
    model = load_text(
        tmp_path,
        HEADER
        + """g (float[3] x, bool c) => (float[3] y) {
            one = Constant<value_floats = [1.0, 2.0, 3.0]>()
            a = Add(x, one)
            y = If(c) <
              then_branch = t () => (float[3] p) {
                two = Constant<value = float[3] {2, 2, 2}>() p = Mul(a, two) },
              else_branch = f () => (float[3] q) { q = Constant<value = float[3] {0, 0, 9}>() }>
        }""",
    )
    x = np.array([1, 2, 3], np.float32)
    before = [outputs(model, x, np.array(flag))[0] for flag in (True, False)]
    notes = model_io.normalize(model)
    after = [outputs(model, x, np.array(flag))[0] for flag in (True, False)]
    np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(after, [[4, 8, 12], [0, 0, 9]])
    # What a branch returns has to be made by a node; the others are initializers.
    assert [n.op_type for n in model.graph.all_nodes()] == ["Add", "If", "Mul", "Constant"]
    assert notes == ()


def test_loop_bodies_keep_their_meaning(tmp_path: Path) -> None:
    model = load_text(
        tmp_path,
        HEADER
        + """g (float[2] x) => (float[2] y, float[3,2] z) {
            n = Constant<value_int = 3>() go = Constant<value = bool {1}>()
            y, z = Loop(n, go, x) <body = b (int64 i, bool in_go, float[2] s)
              => (bool out_go, float[2] s_out, float[2] seen) {
                k = Constant<value = float[2] {2, 3}>()
                s_out = Mul(s, k) out_go = Identity(in_go) seen = Identity(s_out) }>
        }""",
    )
    x = np.array([1, 1], np.float32)
    before = outputs(model, x)
    model_io.normalize(model)
    after = outputs(model, x)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(after[0], [8, 27])


def test_functions_are_inlined(tmp_path: Path) -> None:
    model = load_text(
        tmp_path,
        """<ir_version: 8, opset_import: ["" : 17, "f" : 1]>
        g (float[2] x) => (float[2] y) { a = f.Twice(x) y = f.Twice(a) }
        <domain: "f", opset_import: ["" : 17]> Twice (p) => (q) { q = Add(p, p) }""",
    )
    model_io.normalize(model)
    assert not model.functions
    assert [n.op_type for n in model.graph] == ["Add", "Add"]
    assert len({n.name for n in model.graph}) == 2
    np.testing.assert_array_equal(outputs(model, np.array([1, 2], np.float32))[0], [4, 8])


def test_default_values_become_constants(tmp_path: Path) -> None:
    text = '<ir_version: 3, opset_import: ["" : 13]> g (float[2] x, float[2] w) => (float[2] y) '
    model = load_text(tmp_path, text + "{ y = Add(x, w) }", w=np.array([1, 2], np.float32))
    (note,) = model_io.normalize(model)
    assert "(w)" in note
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert model.ir_version >= 4
    model_io.check(model)


def test_a_model_of_the_wanted_opset_is_left_alone(tmp_path: Path) -> None:
    model = linear(tmp_path)
    assert model_io.normalize(model) == ()
    assert model.opset_imports == {"": 17}


def test_stale_shapes_are_replaced(tmp_path: Path) -> None:
    model = linear(tmp_path)
    (middle,) = (v for n in model.graph if n.op_type == "MatMul" for v in n.outputs)
    middle.shape = ir.Shape([7, 7, 7])
    middle.type = ir.TensorType(ir.DataType.INT8)
    model_io.infer_shapes(model)
    assert middle.dtype == ir.DataType.FLOAT
    assert middle.shape is not None
    assert [str(d) for d in middle.shape] == ["N", "300"]
    weights = model.graph.initializers["w"].const_value
    assert weights is not None
    np.testing.assert_array_equal(weights.numpy(), WEIGHTS)


def test_unknown_operators_keep_the_shapes_they_came_with(tmp_path: Path) -> None:
    model = load_text(
        tmp_path,
        """<ir_version: 8, opset_import: ["" : 17, "vendor" : 1]>
        g (float[2] x) => (float[2,5] y) <float[2,5] a> { a = vendor.Widen(x) y = Relu(a) }""",
    )
    model_io.normalize(model)
    (widened,) = next(iter(model.graph)).outputs
    assert widened.shape == [2, 5]


# --- cloning


def test_a_clone_is_independent_and_shares_weights(tmp_path: Path) -> None:
    model = linear(tmp_path)
    copy = model_io.clone(model)
    assert copy.graph.initializers["w"].const_value is model.graph.initializers["w"].const_value
    next(iter(copy.graph)).name = "renamed"
    copy.graph.initializers["w"].const_value = ir.tensor(np.zeros((4, 300), np.float32))
    assert next(iter(model.graph)).name != "renamed"
    x = np.ones((1, 4), np.float32)
    assert_close(outputs(model, x)[0], np.maximum(x @ WEIGHTS, 0))


# --- saving


@pytest.mark.parametrize("external", [False, True])
def test_round_trip(tmp_path: Path, external: bool) -> None:
    model = linear(tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()
    model_io.save(model, folder / "m.onnx", external_data=external, metadata={"made by": "me"})
    assert names_in(folder) == ({"m.onnx", "m.onnx.data"} if external else {"m.onnx"})
    again = model_io.load(folder / "m.onnx")
    assert again.metadata_props["made by"] == "me"
    assert "made by" not in model.metadata_props
    x = np.ones((2, 4), np.float32)
    for loaded in (again, folder / "m.onnx"):
        np.testing.assert_array_equal(outputs(loaded, x)[0], outputs(model, x)[0])


def test_external_tensors_can_be_put_back_into_one_file(tmp_path: Path) -> None:
    model_io.save(linear(tmp_path), tmp_path / "two.onnx", external_data=True)
    model_io.save(model_io.load(tmp_path / "two.onnx"), tmp_path / "one.onnx")
    (tmp_path / "two.onnx.data").unlink()
    x = np.ones((2, 4), np.float32)
    assert_close(outputs(tmp_path / "one.onnx", x)[0], np.maximum(x @ WEIGHTS, 0))


def test_branches_go_to_external_data_too(tmp_path: Path) -> None:
    model = load_text(
        tmp_path,
        HEADER
        + """g (float[2,4] x, bool c) => (float[2,300] y) {
            y = If(c) <then_branch = t () => (float[2,300] p) { p = MatMul(x, w) },
                       else_branch = f () => (float[2,300] q) { v = Neg(w) q = MatMul(x, v) }>
        }""",
        w=WEIGHTS,
    )
    branch = next(iter(model.graph)).attributes["then_branch"].as_graph()
    name = "own"
    own = ir.Value(name=name, const_value=ir.tensor(WEIGHTS, name=name))
    branch.register_initializer(own)
    next(iter(branch)).replace_input_with(1, own)
    model_io.save(model, tmp_path / "out.onnx", external_data=True)
    assert (tmp_path / "out.onnx").stat().st_size < 2000
    again = model_io.load(tmp_path / "out.onnx")
    x = np.ones((2, 4), np.float32)
    (y,) = outputs(again, x, np.array(True))
    assert_close(y, x @ WEIGHTS)


def test_metadata_of_tensors_is_not_doubled(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(HEADER + "g (float[2] x) => (float[2] y) { y = Add(x, w) }")
    tensor = numpy_helper.from_array(np.ones(2, np.float32), "w")
    for value in ("old", "new"):
        tensor.metadata_props.add(key="origin", value=value)
    proto.graph.initializer.append(tensor)
    model = load_proto(tmp_path, proto)
    for name in ("a.onnx", "b.onnx"):
        model_io.save(model, tmp_path / name)
        written = onnx.load(tmp_path / name).graph.initializer[0]
        assert [(e.key, e.value) for e in written.metadata_props] == [("origin", "new")]
        model = model_io.load(tmp_path / name)


def test_the_ir_version_is_one_that_onnxruntime_reads(tmp_path: Path) -> None:
    model = linear(tmp_path)
    for given, opset, low, high in ((99, 17, 8, MAX_IR_VERSION), (3, 21, 10, MAX_IR_VERSION)):
        model.ir_version, model.opset_imports[""] = given, opset
        model_io.save(model, tmp_path / "out.onnx")
        written = onnx.load(tmp_path / "out.onnx")
        assert low <= written.ir_version <= high
        open_session(tmp_path / "out.onnx")


def test_permissions_of_the_old_file_stay(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    out.touch()
    out.chmod(0o640)
    model_io.save(linear(tmp_path), out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o640


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old.onnx").write_bytes(b"old")
    (tmp_path / "link.onnx").symlink_to(tmp_path / "real" / "old.onnx")
    model_io.save(linear(tmp_path), tmp_path / "link.onnx")
    assert (tmp_path / "link.onnx").is_symlink()
    model_io.load(tmp_path / "real" / "old.onnx")


def test_the_folder_is_missing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="there is no folder"):
        model_io.save(linear(tmp_path), tmp_path / "no" / "out.onnx")


def test_the_target_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="it is a folder"):
        model_io.save(linear(tmp_path), tmp_path)


def test_the_target_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="not a regular file"):
        model_io.save(linear(tmp_path), tmp_path / "pipe")


def test_the_folder_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a read-only mount; permissions do not stop the administrator."""
    model = linear(tmp_path)
    real_open = os.open

    def refuse(path: str | Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, flags, mode)

    before = names_in(tmp_path)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OutputError, match="Permission denied") as caught:
        model_io.save(model, tmp_path / "out.onnx")
    assert "permissions" in str(caught.value.hint)
    assert names_in(tmp_path) == before


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let writes beyond ``size`` bytes fail, as they do on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("external", [False, True])
def test_disk_full_leaves_the_old_files(tmp_path: Path, external: bool) -> None:
    model = linear(tmp_path)
    for name in ("out.onnx", "out.onnx.data"):
        (tmp_path / name).write_bytes(b"old")
    before = names_in(tmp_path)
    with file_size_limit(2000), pytest.raises(OutputError, match="File too large") as caught:
        model_io.save(model, tmp_path / "out.onnx", external_data=external)
    assert "disk is full" in str(caught.value.hint)
    assert names_in(tmp_path) == before
    assert (tmp_path / "out.onnx").read_bytes() == b"old"
    assert (tmp_path / "out.onnx.data").read_bytes() == b"old"


def test_too_little_free_space_is_said_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = linear(tmp_path)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="needs 4800 bytes and 1000 are free"):
        model_io.save(model, tmp_path / "out.onnx")


@pytest.mark.parametrize("moment", ["writing", "first move", "last move"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_interruption_leaves_the_old_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    kind: type[BaseException],
) -> None:
    model = linear(tmp_path)
    out, data = tmp_path / "out.onnx", tmp_path / "out.onnx.data"
    out.write_bytes(b"old")
    data.write_bytes(b"old data")
    before = names_in(tmp_path)
    real_replace = Path.replace

    def write(*_: object, **__: object) -> None:
        raise kind("stop")

    def replace(self: Path, target: Path) -> Path:
        stop_at = data if moment == "first move" else out
        if target == stop_at and self.suffix == ".part":
            raise kind("stop")
        return real_replace(self, target)

    if moment == "writing":
        monkeypatch.setattr(Path, "write_bytes", write)
    else:
        monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OutputError if kind is OSError else kind):
        model_io.save(model, out, external_data=True)
    monkeypatch.undo()
    assert names_in(tmp_path) == before
    assert out.read_bytes() == b"old"
    assert data.read_bytes() == b"old data"


def test_weights_mapped_from_the_data_file_are_not_overwritten(tmp_path: Path) -> None:
    """The source's data file has the very name that the result's would get."""
    model_io.save(linear(tmp_path), tmp_path / "out.onnx", external_data=True)
    source = (tmp_path / "out.onnx.data").read_bytes()
    model = model_io.load(tmp_path / "out.onnx")
    (tmp_path / "out.onnx").rename(tmp_path / "source.onnx")
    model_io.save(model, tmp_path / "out.onnx", external_data=True)
    assert (tmp_path / "out.onnx.data").read_bytes() == source
    x = np.ones((2, 4), np.float32)
    expected = np.maximum(x @ WEIGHTS, 0)
    for loaded in (tmp_path / "source.onnx", tmp_path / "out.onnx", model):
        assert_close(outputs(loaded, x)[0], expected)


def test_the_file_that_weights_are_mapped_from_is_no_target(tmp_path: Path) -> None:
    model_io.save(linear(tmp_path), tmp_path / "a.onnx", external_data=True)
    model = model_io.load(tmp_path / "a.onnx")
    with pytest.raises(OutputError, match="own weights are read from it"):
        model_io.save(model, tmp_path / "a.onnx.data")


def test_a_model_over_two_gigabytes_gets_external_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the limit lowered; benchmarks/large_model.py does it in full size."""
    monkeypatch.setattr(model_io, "ONE_FILE_BYTES", 4000)
    model_io.save(linear(tmp_path), tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").stat().st_size == WEIGHTS.nbytes


def test_a_message_that_is_too_large_is_an_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(model: ir.Model) -> onnx.ModelProto:
        raise ValueError("Message ModelProto exceeds maximum protobuf size of 2GB")

    model = linear(tmp_path)
    monkeypatch.setattr(model_io, "to_proto", too_large)
    with pytest.raises(OutputError, match="does not fit into one file") as caught:
        model_io.save(model, tmp_path / "out.onnx", external_data=False)
    assert "external data" in str(caught.value.hint)
    assert "out.onnx" not in names_in(tmp_path)


def test_offsets_of_external_tensors_are_aligned(tmp_path: Path) -> None:
    text = HEADER + "g (float[4] x) => (float[4] y) { a = Add(x, s) b = Add(a, t) y = Add(b, u) }"
    arrays = {name: np.full((3000, 4), i, np.float32) for i, name in enumerate("tu")}
    model = load_text(tmp_path, text, s=np.ones(4, np.float32), **arrays)
    model_io.save(model, tmp_path / "out.onnx", external_data=True)
    again = model_io.load(tmp_path / "out.onnx")
    small, *large = (again.graph.initializers[name].const_value for name in "stu")
    assert not isinstance(small, ir.ExternalTensor)
    for tensor, array in zip(large, arrays.values(), strict=True):
        assert isinstance(tensor, ir.ExternalTensor)
        assert (tensor.offset or 0) % _serialize.ALIGNMENT == 0
        np.testing.assert_array_equal(tensor.numpy(), array)


# --- measuring


def test_sizes_and_hash(tmp_path: Path) -> None:
    path = tmp_path / "in.onnx"
    linear(tmp_path)
    sizes = model_io.file_sizes(path)
    assert sizes.raw_bytes == path.stat().st_size
    assert sizes.deflated_bytes == len(zlib.compress(path.read_bytes(), 6))
    assert model_io.sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_sizes_count_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcompress._files._BLOCK_BYTES", 1000)
    model_io.save(linear(tmp_path), tmp_path / "out.onnx", external_data=True)
    files = [tmp_path / "out.onnx", tmp_path / "out.onnx.data"]
    sizes = model_io.file_sizes(files[0])
    assert sizes.raw_bytes == sum(file.stat().st_size for file in files)
    assert 0.8 * sizes.raw_bytes < sizes.deflated_bytes <= 1.05 * sizes.raw_bytes
    assert model_io.external_files(files[0]) == (files[1],)


def test_types_of_weights_are_not_written_beside_them(tmp_path: Path) -> None:
    model = linear(tmp_path)
    model_io.normalize(model)
    model_io.save(model, tmp_path / "saved.onnx")
    graph = onnx.load(tmp_path / "saved.onnx").graph
    stored = {tensor.name for tensor in graph.initializer}
    assert stored
    assert not stored & {info.name for info in graph.value_info}
    onnx.checker.check_model(onnx.load(tmp_path / "saved.onnx"), full_check=True)


def test_types_that_inference_finds_are_not_written(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "other" : 1]>
        m (float[n, 3] x, bool c) => (float[n, 3] y) <float[n, 3] a, float[n, 7] b, float[n, 3] d>
        { a = Relu(x) b = other.Unknown(a) d = other.Unknown(b)
          y = If(c) <then_branch = t () => (float[n, 3] p) <float[n, 3] q>
                     { q = Abs(d) p = Neg(q) },
                     else_branch = e () => (float[n, 3] p) <float[n, 3] q>
                     { q = other.Unknown(d) p = Neg(q) }> }"""
    model = ir.from_onnx_text(text)
    model_io.save(model, tmp_path / "saved.onnx")
    graph = onnx.load(tmp_path / "saved.onnx").graph
    assert [info.name for info in graph.value_info] == ["b", "d"]
    branches = {a.name: a.g for a in graph.node[-1].attribute}
    assert [i.name for i in branches["then_branch"].value_info] == []
    assert [i.name for i in branches["else_branch"].value_info] == ["q"]


def test_names_to_keep(tmp_path: Path) -> None:
    model = linear(tmp_path)
    model_io.normalize(model)
    names = [value.name or "" for value in model.graph.initializers.values()]
    model_io.save(model, tmp_path / "saved.onnx", keep_names=names[:1])
    written = onnx.load(tmp_path / "saved.onnx").graph
    assert [t.name for t in written.initializer if t.name in names] == names[:1]
    assert [v.name for v in (*written.input, *written.output)] == [
        v.name for v in (*model.graph.inputs, *model.graph.outputs)
    ]
    assert [value.name for value in model.graph.initializers.values()] == names  # not changed
