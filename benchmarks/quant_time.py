"""Time of quantizing: ours against onnxruntime's ``quantize_static``, in turns.

    python benchmarks/quant_time.py --zoo PATH [--models a,b] [--samples 128] [--rounds 3]
    [--clock cpu] [--json FILE]

Both see the same samples. onnxruntime quantizes as its users do it: minmax, weights per channel,
uint8 activations, int8 weights, one sample per run of its reader. Ours runs twice per round: at
``ranges=mse, weights=nearest, bias_correction=off, smooth=off, equalize=off, search_seconds=0``,
which is the same kind of work (with a look at what onnxruntime fuses and a comparison with float in
speed and outputs, which the other does not make), and with its defaults: error feedback, bias
correction, smoothing, three ways to choose ranges, and the search for a placement, which starts
from nothing (``cache=false``). Loading and simplifying are not timed; the other's loading and
writing are.

``--clock wall`` is what a user waits for; ``cpu`` is the processor time of the process, which other
programs on the machine disturb less (set OMP_NUM_THREADS=1 and pin the process to one core for
figures that can be compared between machines). Medians over the rounds; the ratio is the median of
the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from _judge import Judge, Row
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from onnxcompress import model_io
from onnxcompress.calibration.sources import open_dataset
from onnxcompress.context import PassContext
from onnxcompress.errors import OnnxCompressError
from onnxcompress.interface import input_specs
from onnxcompress.passes.fold import FoldPass
from onnxcompress.passes.quant import QuantOptions, QuantPass
from onnxcompress.passes.simplify import SimplifyPass
from onnxcompress.targets import target_by_name

PLAIN = {
    "ranges": "mse",
    "weights": "nearest",
    "bias_correction": "off",
    "smooth": "off",
    "equalize": "off",
    "search_seconds": "0",
    "cache": "false",
}
DEFAULTS = {"cache": "false"}

CNNS = (
    "mobilenetv1_025_224",
    "squeezenet11",
    "cifar_resnet20",
    "cifar_resnet56",
    "mnist_lenet",
    "kws_dscnn",
    "ppocr_cls",
    "magika_v3_3",
)


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """The first samples of a file, one per run."""

    def __init__(self, path: Path, samples: int) -> None:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        count = min(samples, *(len(array) for array in arrays.values()))
        self._samples: Iterator[Mapping[str, npt.NDArray[np.generic]]] = iter(
            [{n: a[i : i + 1] for n, a in arrays.items()} for i in range(count)]
        )

    def get_next(self) -> Mapping[str, npt.NDArray[np.generic]] | None:
        """The next sample; None at the end."""
        return next(self._samples, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--zoo", required=True, type=Path, help="folder that holds zoo.py")
    parser.add_argument("--models", default=",".join(CNNS), help="comma-separated names")
    parser.add_argument("--models-dir", type=Path, help="folder of prepared models")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    clock = time.process_time if arguments.clock == "cpu" else time.monotonic
    print(f"{'model':22s} {'peer s':>7s} {'mse s':>7s} {'ratio':>6s} {'default s':>9s}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        judge = Judge(arguments.zoo, arguments.models_dir or Path(scratch))
        for name in arguments.models.split(","):
            row = measure(name, judge, arguments, Path(scratch), clock)
            rows.append(row)
            print(line(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def measure(
    name: str,
    judge: Judge,
    arguments: argparse.Namespace,
    scratch: Path,
    clock: Callable[[], float],
) -> Row:
    """Times of one model, all contestants in turns."""
    original = judge.prepare(name)
    data = original.with_suffix(".calib.npz")

    def peer() -> None:
        quantize_static(
            original,
            scratch / "peer.onnx",
            Reader(data, arguments.samples),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )

    times: dict[str, list[float]] = {"peer": [], "mse": [], "default": []}
    try:
        for _ in range(arguments.rounds):
            started = clock()
            peer()
            times["peer"].append(clock() - started)
            for kind, values in (("mse", PLAIN), ("default", DEFAULTS)):
                times[kind].append(ours(original, data, values, arguments.samples, scratch, clock))
    except OnnxCompressError as error:
        return {"model": name, "error": str(error)}
    row: Row = {
        "model": name,
        **{kind: round(statistics.median(t), 2) for kind, t in times.items()},
    }
    ratios = [mine / theirs for mine, theirs in zip(times["mse"], times["peer"], strict=True)]
    return row | {"ratio": round(statistics.median(ratios), 2), "times": times}


def ours(
    original: Path,
    data: Path,
    values: Mapping[str, str],
    samples: int,
    scratch: Path,
    clock: Callable[[], float],
) -> float:
    """Seconds of the quant pass."""
    model = model_io.load(original)
    model_io.normalize(model)
    context = PassContext(
        target=target_by_name("auto"),
        work_dir=scratch,
        calibration=open_dataset(data, input_specs(model), limit=samples),
    )
    for before in (SimplifyPass(), FoldPass()):
        before.run(model, context)
    started = clock()
    QuantPass(QuantOptions.parse(dict(values), owner="quant")).run(model, context)
    return clock() - started


def line(row: Row) -> str:
    """One row of the table."""
    if "error" in row:
        return f"{row['model']:22s} {row['error']}"
    return (
        f"{row['model']:22s} {row['peer']:7.2f} {row['mse']:7.2f} {row['ratio']:6.2f} "
        f"{row['default']:9.2f}"
    )


if __name__ == "__main__":
    main()
