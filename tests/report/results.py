"""Results made by hand, for tests of the reports."""

from __future__ import annotations

from pathlib import Path

from onnxcompress.passes.base import Change, PassReport, Skip, Stage
from onnxcompress.recipe import Recipe
from onnxcompress.result import CompressionResult, PassRun
from onnxcompress.verification.classes import Accuracy, Agreement
from onnxcompress.verification.compare import Comparison
from onnxcompress.verification.footprint import Footprint
from onnxcompress.verification.gates import GateOutcome
from onnxcompress.verification.metrics import OutputFidelity
from onnxcompress.verification.side_by_side import Timing, Verification

OUTPUT = OutputFidelity(
    name="logits",
    samples=466,
    elements=4660,
    is_float=True,
    equal_ratio=0.01,
    max_abs_error=0.75,
    mean_abs_error=0.125,
    sqnr_db=31.25,
    cosine=0.99962,
    worst_sqnr_db=18.5,
    worst_cosine=0.98,
    worst_sample=17,
    nonfinite_original=0,
    nonfinite_result=0,
)

ORIGINAL = Footprint(
    raw_bytes=1_090_000,
    deflated_bytes=1_010_000,
    weight_bytes=1_080_000,
    parameters=269_000,
    macs=40_600_000,
    nodes=74,
    opset=13,
    peak_memory_bytes=5_000_000,
    load_ms=12.0,
)

RESULT = Footprint(
    raw_bytes=310_000,
    deflated_bytes=260_000,
    weight_bytes=270_000,
    parameters=188_300,
    macs=28_400_000,
    nodes=90,
    opset=13,
    peak_memory_bytes=6_000_000,
    load_ms=18.0,
)


def timing(low: float, middle: float, high: float, *, batch: int = 1) -> Timing:
    return Timing(
        batch_size=batch,
        threads=1,
        speedup_ratio=middle,
        speedup_low_ratio=low,
        speedup_high_ratio=high,
        original_ms=0.82,
        result_ms=0.4,
        runs=50,
    )


VERIFICATION = Verification(
    original=ORIGINAL,
    result=RESULT,
    comparison=Comparison(
        samples=466,
        outputs=(OUTPUT,),
        agreements=(Agreement("logits", 10, 466, 0.9871, 0.9999, "the labels fit it"),),
        accuracy=Accuracy("logits", 466, 0.9163, 0.9142, -0.0021, -0.012, 0.008, 3, 2),
    ),
    gates=(GateOutcome("agreement", "logits", 0.5, 0.9871, True, True),),
    enforced=True,
    timings=(timing(1.9, 2.05, 2.1), timing(0.9, 1.01, 1.1, batch=8)),
    data="'digits.eval.npz'",
    synthetic=False,
    providers=("CPUExecutionProvider",),
    warnings=(),
)

COMPRESSION = CompressionResult(
    input_path=Path("digits.onnx"),
    output_path=Path("small.onnx"),
    written=True,
    dry_run=False,
    passes=(
        PassRun(
            name="fold",
            stage=Stage.PREPARE,
            automatic=True,
            options={},
            report=PassReport(changes=(Change("bn", "BatchNormalization", "folded"),)),
            seconds=0.12,
        ),
        PassRun(
            name="quant",
            stage=Stage.PRECISION,
            automatic=False,
            options={"mode": "static"},
            report=PassReport(
                skips=(
                    *(Skip(f"conv{i}", "Conv", "too few channels") for i in range(5)),
                    *(Skip(f"odd{i}", "Mul", f"reason [{i}]") for i in range(6)),
                ),
                figures={"quantized_ratio": 0.87654, "mode": "static"},
                notes=("The head stays in float.",),
            ),
            seconds=3.4,
        ),
    ),
    verification=VERIFICATION,
    recipe=Recipe(passes=("quant",)),
    target="x86-vnni",
    calibration="200 samples, 'digits.calib.npz'",
    timings_s={"load": 0.1},
    original_sha256="ab" * 32,
    result_sha256="cd" * 32,
    version="0.1.0",
    notes=("Added fold before the passes asked for.",),
    warnings=("Something is odd.",),
)
