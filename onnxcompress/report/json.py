"""Reports as JSON: everything that was measured, numbers with their units in the names.

``schema_version`` rises when a name changes its meaning or goes away; new names may come at any
time. Infinite numbers (the SQNR of identical outputs) and unknown ones are null.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import onnxcompress
from onnxcompress.inspection import Inspection
from onnxcompress.output import SideFile, check_side_file, write_side_file
from onnxcompress.result import CompressionResult
from onnxcompress.verification.side_by_side import Verification

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SCHEMA_VERSION = 1

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]


def compression_report(result: CompressionResult) -> dict[str, Plain]:
    """A run of the pipeline."""
    made = _report("compression", result)
    made["passed"] = result.passed
    if result.verification is not None:
        made["verification"] = _verification(result.verification)
    made["recipe"] = plain(result.recipe.to_dict())
    return made


def verification_report(
    verification: Verification, original: Path, result: Path
) -> dict[str, Plain]:
    """A comparison of two models."""
    made: dict[str, Plain] = _header("verification")
    made |= {"original_path": str(original), "result_path": str(result)}
    return made | _verification(verification)


def benchmark_report(timed: Verification, original: Path, result: Path) -> dict[str, Plain]:
    """A timing of two models."""
    made: dict[str, Plain] = _header("benchmark")
    made |= {"original_path": str(original), "result_path": str(result)}
    kept = ("original", "result", "timings", "data", "synthetic", "providers")
    return made | {name: plain(getattr(timed, name)) for name in kept}


def inspection_report(inspection: Inspection) -> dict[str, Plain]:
    """A look into one model."""
    return _report("inspection", inspection)


def dumps(report: Mapping[str, Plain]) -> str:
    """A report as JSON text, ending in a newline."""
    return json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write(report: Mapping[str, Plain], path: Path) -> None:
    """Write a report to a file.

    Raises:
        UsageError: If another file would be overwritten.
        OutputError: If it cannot be written.
    """
    check_side_file(path, SideFile.REPORT)
    write_side_file(path, SideFile.REPORT, dumps(report))


def plain(value: object) -> Plain:
    """Dataclasses, mappings, tuples, enums and paths as what JSON has."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, enum.Enum):
        return value.name.lower()
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _fields(value)
    if isinstance(value, Mapping):
        return {str(name): plain(member) for name, member in value.items()}
    if isinstance(value, list | tuple):
        return [plain(member) for member in value]
    return str(value)


def _header(kind: str) -> dict[str, Plain]:
    return {
        "schema_version": SCHEMA_VERSION,
        "report": kind,
        "onnxcompress_version": onnxcompress.__version__,
    }


def _fields(value: DataclassInstance) -> dict[str, Plain]:
    return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}


def _report(kind: str, value: DataclassInstance) -> dict[str, Plain]:
    return _header(kind) | {n: member for n, member in _fields(value).items() if n != "version"}


def _verification(verification: Verification) -> dict[str, Plain]:
    made = _fields(verification)
    made["passed"] = verification.passed
    made["failures"] = list(verification.failures)
    return made
