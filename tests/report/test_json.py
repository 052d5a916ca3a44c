from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from onnxcompress.errors import OutputError, UsageError
from onnxcompress.report import json as reports
from onnxcompress.verification.compare import Comparison
from tests.report.results import COMPRESSION, OUTPUT, VERIFICATION

# Names that readers rely on: taking one away or changing its meaning needs a new schema_version.
TOP = {
    "schema_version",
    "report",
    "onnxcompress_version",
    "input_path",
    "output_path",
    "written",
    "dry_run",
    "passed",
    "passes",
    "verification",
    "recipe",
    "target",
    "calibration",
    "timings_s",
    "original_sha256",
    "result_sha256",
    "notes",
    "warnings",
}
VERIFIED = {
    "passed",
    "failures",
    "original",
    "result",
    "comparison",
    "gates",
    "enforced",
    "timings",
    "data",
    "synthetic",
    "providers",
    "warnings",
}


def test_the_names_of_schema_1() -> None:
    report = json.loads(reports.dumps(reports.compression_report(COMPRESSION)))
    assert report["schema_version"] == 1
    assert set(report) == TOP
    assert set(report["verification"]) == VERIFIED
    assert set(report["passes"][1]) == {
        "name",
        "stage",
        "automatic",
        "options",
        "report",
        "seconds",
        "after",
    }
    assert report["passes"][1]["stage"] == "precision"
    assert report["passes"][1]["report"]["figures"]["quantized_ratio"] == 0.87654
    assert report["verification"]["original"]["raw_bytes"] == 1_090_000
    assert report["verification"]["timings"][0]["speedup_ratio"] == 2.05
    assert report["verification"]["comparison"]["accuracy"]["difference_ratio"] == -0.0021
    assert report["recipe"]["passes"] == ["quant"]
    assert report["input_path"] == "digits.onnx"


def test_infinite_numbers_are_null() -> None:
    same = dataclasses.replace(OUTPUT, sqnr_db=math.inf, max_abs_error=math.nan)
    verification = dataclasses.replace(VERIFICATION, comparison=Comparison(1, (same,)))
    report = reports.verification_report(verification, Path("a"), Path("b"))
    output = json.loads(reports.dumps(report))["comparison"]["outputs"][0]
    assert output["sqnr_db"] is None
    assert output["max_abs_error"] is None


def test_a_dry_run_has_no_verification() -> None:
    dry = dataclasses.replace(COMPRESSION, verification=None, dry_run=True, written=False)
    report = reports.compression_report(dry)
    assert report["verification"] is None
    assert report["passed"] is True


def test_a_benchmark_says_nothing_of_outputs() -> None:
    report = reports.benchmark_report(VERIFICATION, Path("a"), Path("b"))
    assert report["report"] == "benchmark"
    assert "comparison" not in report
    assert "timings" in report


def test_where_a_report_cannot_go(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="named like a model"):
        reports.write({}, tmp_path / "model.onnx")
    with pytest.raises(OutputError, match="cannot be written"):
        reports.write({}, tmp_path / "no" / "r.json")
