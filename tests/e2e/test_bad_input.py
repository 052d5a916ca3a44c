"""Whatever is wrong with the input: one clear error, the right exit code, no partial file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcompress.cli import main
from tests import fakes

Break = Callable[[Path], object]


def edit(change: Callable[[onnx.ModelProto], object]) -> Break:
    """A way to break a model file by changing what is in it."""

    def broken(path: Path) -> None:
        proto = onnx.load(path)
        change(proto)
        onnx.save(proto, path)

    return broken


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def cyclic(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[0] = "r"


def custom_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].op_type, proto.graph.node[1].domain = "Mystery", "my.company"
    proto.opset_import.append(onnx.helper.make_opsetid("my.company", 1))


def external_data(location: str) -> Break:
    def change(proto: onnx.ModelProto) -> None:
        tensor = proto.graph.initializer[0]
        onnx.external_data_helper.set_external_data(tensor, location)
        tensor.ClearField("raw_data")

    return edit(change)


MODELS: dict[str, tuple[Break, str]] = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:300]), "in.onnx"),
    "empty": (lambda p: p.write_bytes(b""), "in.onnx"),
    "text": (lambda p: p.write_text("hello"), "in.onnx"),
    "missing": (lambda p: p.unlink(), "in.onnx"),
    "a folder": (folder, "in.onnx"),
    "cyclic": (edit(cyclic), ""),
    "unknown operator": (
        edit(lambda m: setattr(m.graph.node[1], "op_type", "NoSuchOperator")),
        "NoSuchOperator",
    ),
    "custom operator": (edit(custom_operator), "my.company::Mystery"),
    "future opset": (edit(lambda m: setattr(m.opset_import[0], "version", 9999)), "9999"),
    "future IR": (edit(lambda m: setattr(m, "ir_version", 9999)), "9999"),
    "missing external data": (external_data("weights.bin"), "weights.bin"),
    "escaping external data": (external_data("../../etc/passwd"), "passwd"),
    "missing weight": (edit(lambda m: m.graph.initializer.pop()), "b2"),
}


def run(where: Path, *arguments: object) -> int:
    given = ("--passes", "fold", "--no-bench", *arguments)
    return main([str(where / "in.onnx"), str(where / "out.onnx"), *map(str, given)])


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fakes.save_classifier(tmp_path / "in.onnx")
    breaking, message = MODELS[name]
    breaking(tmp_path / "in.onnx")
    assert run(tmp_path) == 3
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert "internal error" not in shown.err
    assert fakes.leftovers(tmp_path, "in.onnx") == []


def nan() -> fakes.Floats:
    values = fakes.samples(4)
    values[2, 1] = np.nan
    return values


DATA: dict[str, tuple[dict[str, object], str]] = {
    "another name": ({"image": fakes.samples(4), "mask": fakes.samples(4)}, "'x'"),
    "another shape": ({"x": np.zeros((4, 5), np.float32)}, "[5]"),
    "another type": ({"x": np.zeros((4, 6), np.complex64)}, "complex64"),
    "no samples": ({"x": np.zeros((0, 6), np.float32)}, "no samples"),
    "NaN": ({"x": nan()}, "NaN"),
    "objects": ({"x": np.array([{}, {}], dtype=object)}, "never unpickled"),
}


@pytest.mark.parametrize("role", ["--eval", "--calib"])
@pytest.mark.parametrize("name", DATA)
def test_data(name: str, role: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fakes.save_classifier(tmp_path / "in.onnx")
    arrays, message = DATA[name]
    np.savez(tmp_path / "data.npz", **arrays)  # type: ignore[arg-type]  # arrays of any kind
    assert run(tmp_path, role, tmp_path / "data.npz") == 3
    shown = capsys.readouterr()
    assert message in shown.err
    assert "data.npz" in shown.err
    assert fakes.leftovers(tmp_path, "in.onnx", "data.npz") == []


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x93NUMPY"])
def test_data_files_that_are_damaged(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes.save_classifier(tmp_path / "in.onnx")
    (tmp_path / "data.npz").write_bytes(content)
    assert run(tmp_path, "--eval", tmp_path / "data.npz") == 3
    assert "data.npz" in capsys.readouterr().err
