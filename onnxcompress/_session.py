"""The only file that builds onnxruntime sessions.

onnxruntime's own exceptions never leave it: what cannot be loaded or run becomes a
:class:`~onnxcompress.errors.ModelError` that names the operator or node.
"""

from __future__ import annotations

import enum
import functools
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from onnxcompress._serialize import IN_MEMORY_BYTES, relocate_external, tensor_bytes
from onnxcompress.errors import ModelError, ProviderError, UsageError
from onnxcompress.interface import TensorSpec

Array = npt.NDArray[np.generic]

_SEVERITY_FATAL = 4
"""Everything that onnxruntime logs at "error" also comes as an exception."""

ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    ValueError,
    *(
        kind
        for kind in vars(ort_state).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ),
)
"""What onnxruntime raises; its own classes have no common base."""

_DTYPES: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
    "tensor(string)": np.object_,
}


class Optimization(enum.Enum):
    """How much onnxruntime rewrites a graph before it runs it."""

    ALL = "all"
    EXTENDED = "extended"
    BASIC = "basic"
    NONE = "none"


_LEVELS = {
    Optimization.ALL: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    Optimization.EXTENDED: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    Optimization.BASIC: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    Optimization.NONE: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """How to run a model.

    Attributes:
        providers: Execution providers, best first.
        threads: Threads inside one operator; 0 takes all cores.
        optimization: Graph optimization level.
        low_memory: Trade speed for memory: no arena, no memory patterns, and consumers of a value
            run as soon as they can, so that a value that is only reduced to a statistic is freed
            right away.
        emulates: The CPU stands in for other hardware: a product whose weights alone are quantized
            is computed in float, where onnxruntime would round the data to 8 bits to be faster.
    """

    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    threads: int = 0
    optimization: Optimization = Optimization.ALL
    low_memory: bool = False
    emulates: bool = False


_FLOAT_PRODUCTS = "1"
"""The accuracy level at which MatMulNBits leaves its data in float32."""


class Session:
    """A loaded model.

    Attributes:
        inputs: What has to be fed.
        outputs: What comes out.
        providers: The execution providers really in use, best first.
        threads: Threads inside one operator; 0 means all cores.
    """

    def __init__(
        self,
        inner: ort.InferenceSession,
        settings: SessionSettings,
        scratch: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        self._inner = inner
        self._scratch = scratch  # Holds the weights that `inner` maps, as long as it lives.
        self.inputs = tuple(_spec(arg) for arg in inner.get_inputs())
        self.outputs = tuple(_spec(arg) for arg in inner.get_outputs())
        self.providers: tuple[str, ...] = tuple(inner.get_providers())
        self.threads = settings.threads

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run the model once.

        Args:
            feeds: Input name to array.
            outputs: Names of the outputs wanted; all when None.

        Returns:
            Output name to array.

        Raises:
            ModelError: If onnxruntime refuses the inputs or a node fails.
            MemoryError: If there is not enough memory for this batch.
        """
        names = [o.name for o in self.outputs] if outputs is None else list(outputs)
        # onnxruntime takes numpy's scalars for unknown objects, hence asarray.
        arrays = {name: np.asarray(array) for name, array in feeds.items()}
        try:
            values = self._inner.run(names, arrays)
        except ORT_ERRORS as error:
            message = one_line(error)
            if _is_out_of_memory(message):
                raise MemoryError(message) from error
            fed = ", ".join(f"{k}: {v.dtype}{list(v.shape)}" for k, v in arrays.items())
            raise ModelError(f"running the model failed: {message} (inputs {fed})") from error
        return dict(zip(names, values, strict=True))

    def end_profiling(self) -> Path:
        """Stop profiling and return the file that onnxruntime wrote."""
        return Path(self._inner.end_profiling())


def _spec(arg: ort.NodeArg) -> TensorSpec:
    if arg.type not in _DTYPES:
        raise ModelError(
            f"input or output '{arg.name}' is of type {arg.type}, which is not supported",
            hint="Inputs and outputs must be dense tensors of an element type that numpy has.",
        )
    shape = None if arg.shape is None else tuple(_dimension(d) for d in arg.shape)
    return TensorSpec(arg.name, np.dtype(_DTYPES[arg.type]), shape)


def _dimension(dimension: int | str | None) -> int | str:
    return dimension if isinstance(dimension, int) else (dimension or "")


def one_line(error: BaseException) -> str:
    """An exception's message on one line, without onnxruntime's source paths, at most 600 long."""
    words = [w for w in str(error).split() if not w.startswith("/onnxruntime_src/")]
    return " ".join(words)[:600]


def _is_out_of_memory(message: str) -> bool:
    signs = ("bad_alloc", "Failed to allocate memory", "out of memory", "BFCArena")
    return any(sign in message for sign in signs)


@functools.cache
def _loads(ir_version: int, opset: int, domain: str = "") -> bool:
    """Whether onnxruntime accepts a one-node model stamped with these versions."""
    helper = onnx.helper
    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    graph = helper.make_graph(nodes, "probe", value[:1], value[1:])
    imports = [helper.make_opsetid("", 13)] if domain else []
    imports.append(helper.make_opsetid(domain, opset))
    proto = helper.make_model(graph, ir_version=ir_version, opset_imports=imports)
    options = ort.SessionOptions()
    options.log_severity_level = _SEVERITY_FATAL
    try:
        ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS:
        return False
    return True


def _newest_ir_version() -> int:
    version: int = onnx.IR_VERSION
    while version > 3 and not _loads(version, 13):
        version -= 1
    return version


MAX_IR_VERSION: int = _newest_ir_version()
"""The newest ONNX IR version that the installed onnxruntime reads (found by asking it)."""


def reads_opset(version: int, domain: str = "") -> bool:
    """Whether the installed onnxruntime reads models of this operator set version."""
    return _loads(MAX_IR_VERSION, version, domain)


def resolve_providers(name: str) -> tuple[str, ...]:
    """Turn the command line's ``cpu``, ``cuda`` or ``auto`` into execution providers.

    Raises:
        UsageError: If the name is unknown.
        ProviderError: If the provider is not in this onnxruntime.
    """
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    if name not in {"cpu", "cuda", "auto"}:
        raise UsageError(f"unknown provider '{name}'", hint="Use cpu, cuda or auto.")
    if name == "cpu":
        return (cpu,)
    if name == "auto" and cuda not in ort.get_available_providers():
        return (cpu,)
    _require((cuda, cpu))
    return (cuda, cpu)


def _require(providers: Iterable[str]) -> None:
    available = ort.get_available_providers()
    for provider in providers:
        if provider not in available:
            raise ProviderError(
                f"this onnxruntime ({ort.__version__}) has no {provider}, "
                f"only {', '.join(available)}",
                hint="For CUDA install onnxruntime-gpu in place of onnxruntime, or use "
                "--provider cpu.",
            )


def _options(settings: SessionSettings) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = _SEVERITY_FATAL
    options.graph_optimization_level = _LEVELS[settings.optimization]
    options.intra_op_num_threads = settings.threads
    if settings.low_memory:
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    if settings.emulates:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", _FLOAT_PRODUCTS)
    return options


def open_session(
    model: ir.Model | str | os.PathLike[str],
    settings: SessionSettings | None = None,
    *,
    work_dir: Path | None = None,
    configure: Callable[[ort.SessionOptions], None] | None = None,
) -> Session:
    """Load a model into onnxruntime.

    External tensors are mapped by onnxruntime from their own files. Tensors in memory of more than
    256 MiB in all go through a file in ``work_dir``, since a message in memory is held three times
    (message, bytes, session) and ends at 2 GB.

    Args:
        model: A graph, or a file.
        settings: How to run it.
        work_dir: Where a temporary folder may be made; the system's when None.
        configure: Called on the session options last.

    Raises:
        ModelError: If onnxruntime does not load it; operators it does not know are named.
        ProviderError: If a provider is not available or is not really used.
        MemoryError: If there is not enough memory.
    """
    settings = settings or SessionSettings()
    _require(settings.providers)
    options = _options(settings)
    scratch: tempfile.TemporaryDirectory[str] | None = None
    source: str | bytes
    if isinstance(model, ir.Model):
        if tensor_bytes(model) > IN_MEMORY_BYTES:
            scratch = tempfile.TemporaryDirectory(dir=work_dir, prefix="session-")
        proto, folder = relocate_external(model, None if scratch is None else Path(scratch.name))
        if folder is not None:
            key = "session.model_external_initializers_file_folder_path"
            options.add_session_config_entry(key, str(folder))
        source = proto.SerializeToString()
        del proto
    else:
        source = os.fspath(model)
    if configure is not None:
        configure(options)
    try:
        inner = ort.InferenceSession(
            source, options, providers=list(settings.providers), enable_fallback=0
        )
    except ORT_ERRORS as error:
        if _is_out_of_memory(str(error)):
            raise MemoryError(one_line(error)) from error
        raise _load_error(model, error) from error
    session = Session(inner, settings, scratch)
    wanted = settings.providers[0]
    if wanted not in session.providers:
        raise ProviderError(
            f"onnxruntime fell back from {wanted} to {', '.join(session.providers)}",
            hint="Its libraries (for CUDA: driver, CUDA and cuDNN of the versions that this "
            "onnxruntime was built for) could not be loaded.",
        )
    return session


def _load_error(model: ir.Model | str | os.PathLike[str], error: Exception) -> ModelError:
    unknown = unknown_operators(model)
    if unknown:
        return ModelError(
            f"onnxruntime does not know {', '.join(unknown)}",
            hint="The model needs a library of custom operators, without which it cannot be run.",
        )
    name = "the model" if isinstance(model, ir.Model) else f"'{os.fspath(model)}'"
    message = one_line(error)
    hint = "Give every node a name of its own." if "same node name" in message else None
    return ModelError(f"onnxruntime does not load {name}: {message}", hint=hint)


@functools.cache
def _known_operators() -> frozenset[tuple[str, str]]:
    return frozenset(
        ("" if schema.domain == "ai.onnx" else schema.domain, schema.name)
        for schema in ort_state.get_all_operator_schema()
    )


def unknown_operators(model: ir.Model | str | os.PathLike[str]) -> list[str]:
    """Operators that onnxruntime has no definition of, as ``domain::Op (node 'name')``, each once.

    Args:
        model: A graph, or a file (one that is not a model has none).
    """
    if not isinstance(model, ir.Model):
        try:
            model = ir.from_proto(onnx.load_model(model, "protobuf", load_external_data=False))
        except (OSError, ValueError, ir.serde.SerdeError):
            return []
    found: dict[tuple[str, str], str] = {}
    for node in model.graph.all_nodes():
        key = (node.domain, node.op_type)
        if key not in _known_operators() and node.op_identifier() not in model.functions:
            label = f"{node.domain or 'ai.onnx'}::{node.op_type} (node '{node.name}')"
            found.setdefault(key, label)
    return list(found.values())
