"""Count on small models with old operators what each opset converter makes of them.

    python -m benchmarks.opset_converters

Takes the models of tests/test_opset.py, raises each to opset 13 and 21 with our converter and with
the one of the onnx package, and compares the outputs in onnxruntime with those of the original.
Prints JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir

from onnxcompress.errors import ModelError
from onnxcompress.model_io import infer_shapes
from onnxcompress.opset import upgrade
from onnxcompress.runtime import SessionSettings, open_session
from tests.test_opset import CASES, NO_OPTIMIZATION, inputs_of, parse


def ours(model: ir.Model, target: int) -> ir.Model:
    infer_shapes(model)
    upgrade(model, target)
    return model


def onnx_package(model: ir.Model, target: int) -> ir.Model:
    proto = ir.to_proto(model)
    known = {value.name for value in proto.graph.input}
    for tensor in proto.graph.initializer:  # It wants initializers to be inputs, too.
        if tensor.name not in known:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            proto.graph.input.append(info)
    return ir.from_proto(onnx.version_converter.convert_version(proto, target))


def outcome(convert: Callable[[ir.Model, int], ir.Model], case: str, target: int) -> str:
    """``equal``, ``wrong`` (other outputs), ``unloadable`` or ``refused`` (with an error)."""
    opset, text = CASES[case]
    original = parse(opset, text)
    feeds = inputs_of(original, 0)
    expected = open_session(original, NO_OPTIMIZATION).run(feeds)
    try:
        converted = convert(parse(opset, text), target)
    except (ModelError, RuntimeError):
        return "refused"
    try:
        seen = open_session(converted, SessionSettings(threads=1)).run(feeds)
    except ModelError:
        return "unloadable"
    same = all(
        seen[name].shape == array.shape
        and np.allclose(seen[name].astype(np.float64), array.astype(np.float64), 1e-6, 1e-6)
        for name, array in expected.items()
    )
    return "equal" if same else "wrong"


def main() -> None:
    table: dict[str, dict[str, list[str]]] = {}
    for name, convert in (("onnxcompress", ours), ("onnx", onnx_package)):
        for target in (13, 21):
            row = table.setdefault(f"{name} to {target}", {})
            for case, (opset, _) in CASES.items():
                if opset < target:
                    row.setdefault(outcome(convert, case, target), []).append(case)
    shown = {
        name: {kind: len(cases) if kind == "equal" else cases for kind, cases in row.items()}
        for name, row in table.items()
    }
    print(json.dumps(shown, indent=2))


if __name__ == "__main__":
    main()
