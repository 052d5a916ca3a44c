from __future__ import annotations

import dataclasses
import io
import math

import pytest
from rich.console import Console, RenderableType

from onnxcompress.contributions import Contribution
from onnxcompress.passes.base import Table
from onnxcompress.report import console, terminal
from onnxcompress.verification.compare import Comparison
from onnxcompress.verification.gates import GateOutcome
from onnxcompress.verification.side_by_side import Verification
from tests.report.results import COMPRESSION, OUTPUT, VERIFICATION, timing


def text(page: RenderableType, *, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, no_color=True, highlight=False)
    with console.capture() as captured:
        console.print(page)
    return captured.get()


def row(page: RenderableType, name: str) -> str:
    """The words of one row, single blanks between them."""
    (line,) = (line for line in text(page).splitlines() if line.strip().startswith(name + " "))
    return " ".join(line.split())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("size", "size 1.09 MB 310 kB 3.52× smaller"),
        ("size, deflated", "size, deflated 1.01 MB 260 kB 3.88× smaller"),
        ("parameters", "parameters 269 k 188 k −30 %"),
        ("MACs", "MACs 40.6 M 28.4 M −30 %"),
        ("peak memory", "peak memory 5.00 MB 6.00 MB +20 %"),
        ("load time", "load time 12.0 ms 18.0 ms 1.50× longer"),
        ("latency, batch 1", "latency, batch 1 820 µs 400 µs 2.05× faster (1.90 to 2.10)"),
        ("latency, batch 8", "latency, batch 8 820 µs 400 µs 1.01× (0.90 to 1.10)"),
        ("top-1", "top-1 91.63 % 91.42 % −0.21 points (95 %: −1.20 to +0.80)"),
        ("agreement", "agreement 98.71 % top-5 99.99 %"),
        ("SQNR", "SQNR 31.2 dB worst sample 18.5 dB"),
        ("cosine", "cosine 0.9996 worst sample 0.9800"),
    ],
)
def test_rows(name: str, expected: str) -> None:
    page = terminal.BeforeAfter(VERIFICATION)
    if name == "size":
        assert " ".join(text(page).split("size")[1].split()).startswith(expected[5:])
    else:
        assert row(page, name) == expected


def test_slower_is_said() -> None:
    slow = dataclasses.replace(VERIFICATION, timings=(timing(0.5, 0.6, 0.7),))
    assert "0.60×, slower" in row(terminal.BeforeAfter(slow), "latency, batch 1")


def test_threads_are_named_when_they_are_not_one() -> None:
    two = dataclasses.replace(timing(1, 1, 1), threads=2)
    every = dataclasses.replace(two, threads=0)
    shown = text(terminal.BeforeAfter(dataclasses.replace(VERIFICATION, timings=(two, every))))
    assert "latency, batch 1, 2 threads" in shown
    assert "latency, batch 1, all cores" in shown


def test_the_worst_of_several_outputs_is_named() -> None:
    worse = dataclasses.replace(OUTPUT, name="mask", cosine=0.5, sqnr_db=40.0)
    page = terminal.BeforeAfter(
        dataclasses.replace(VERIFICATION, comparison=Comparison(1, (OUTPUT, worse)))
    )
    assert row(page, "cosine, mask").startswith("cosine, mask 0.5000")
    assert row(page, "SQNR, logits").startswith("SQNR, logits 31.2 dB")


def test_identical_outputs() -> None:
    same = dataclasses.replace(
        OUTPUT, sqnr_db=math.inf, worst_sqnr_db=math.inf, cosine=1.0, worst_cosine=1.0
    )
    page = terminal.BeforeAfter(
        dataclasses.replace(VERIFICATION, comparison=Comparison(1, (same,)))
    )
    assert row(page, "SQNR") == "SQNR identical"


def test_models_without_float_outputs() -> None:
    whole = dataclasses.replace(OUTPUT, is_float=False, sqnr_db=None, cosine=None, equal_ratio=0.75)
    page = terminal.BeforeAfter(
        dataclasses.replace(VERIFICATION, comparison=Comparison(1, (whole,)))
    )
    assert row(page, "equal elements") == "equal elements 75.00 %"


def test_the_whole_report() -> None:
    shown = text(terminal.compression(COMPRESSION))
    for words in (
        "fold  1 change, 0.1 s  (added)",
        "quantized ratio 0.8765, mode static",
        "The head stays in float.",
        "skipped Conv 'conv0', Conv 'conv1', Conv 'conv2' and 2 more: too few channels",
        "skipped Mul 'odd0': reason [0]",
        "skipped 3 more for other reasons (-v shows all)",
        "calibrated on 200 samples, 'digits.calib.npz'",
        "verified on 466 samples, 'digits.eval.npz'",
        "latency in turns on CPU, 1 thread",
        "Added fold before the passes asked for.",
        "warning: Something is odd.",
        "passed the default gate",
        "written to small.onnx",
    ):
        assert words in shown
    assert "folded" not in shown


def test_verbose_shows_everything() -> None:
    shown = text(terminal.compression(COMPRESSION, verbose=True))
    for words in ("'bn': folded", "Conv 'conv4': too few", "reason [5]", "max error", "0.125"):
        assert words in shown


def failed(verification: Verification) -> Verification:
    missed = GateOutcome("cosine", "logits", 0.999, 0.9962, False, False)
    return dataclasses.replace(verification, gates=(missed,))


def test_tables_of_a_pass_show_their_first_rows_and_count_the_others() -> None:
    rows = tuple((f"node_{k}", "Conv", 30.0 + k, 7) for k in range(13))
    table = Table("sensitivity in dB", ("node", "operator", "only it", "MACs"), rows)
    (first, *others) = COMPRESSION.passes
    run = dataclasses.replace(first, report=dataclasses.replace(first.report, tables=(table,)))
    result = dataclasses.replace(COMPRESSION, passes=(run, *others))
    short, whole = (text(terminal.compression(result, verbose=v)) for v in (False, True))
    assert "sensitivity in dB" in short
    assert "node_9" in short
    assert "node_10" not in short
    assert "and 3 more (-v shows all)" in short
    assert "node_12" in whole
    assert "more (-v" not in whole
    assert row(terminal.compression(result), "node_1") == "node_1 Conv 31 7"


def test_the_model_after_each_pass() -> None:
    after = Contribution(
        weight_bytes=1_250_000,
        parameters=300,
        macs=1_430_000,
        samples=32,
        sqnr_db=36.04,
        agreement_ratio=None,
        speed_ratio=1.234,
    )
    passes = tuple(dataclasses.replace(entry, after=after) for entry in COMPRESSION.passes)
    shown = text(terminal.compression(dataclasses.replace(COMPRESSION, passes=passes)))
    block = shown.split("after each pass, beside the original")[1]
    for word in ("fold", "quant", "1.25 MB", "1.43 M", "36.0 dB", "1.23×", "on 32 samples"):
        assert word in block
    assert "after each pass" not in text(terminal.compression(COMPRESSION))


def test_failures_are_told() -> None:
    result = dataclasses.replace(COMPRESSION, verification=failed(VERIFICATION), written=False)
    shown = text(terminal.compression(result))
    assert "failed: cosine of output 'logits' is 0.9962; it must be at least 0.999" in shown
    assert "passed" not in shown
    assert "'small.onnx' was not written" in shown


def test_limits_that_are_not_enforced_are_told() -> None:
    loose = dataclasses.replace(failed(VERIFICATION), enforced=False)
    shown = text(terminal.verification(loose))
    assert "not enforced: cosine" in shown
    assert "passed" not in shown


def test_a_result_that_does_not_load() -> None:
    broken = dataclasses.replace(
        VERIFICATION,
        result=None,
        timings=(),
        gates=(),
        comparison=Comparison(fatal=("the result does not load: why",)),
    )
    assert "failed: the result does not load: why" in text(terminal.verification(broken))


def test_names_in_brackets_are_no_markup() -> None:
    odd = dataclasses.replace(OUTPUT, name="[bold]x[/bold]")
    two = dataclasses.replace(VERIFICATION, comparison=Comparison(1, (odd, OUTPUT)))
    assert "[bold]x[/bold]" in text(terminal.verification(two, verbose=True))


@pytest.mark.parametrize("width", [24, 40, 60])
def test_narrow_terminals_lose_nothing(width: int) -> None:
    shown = text(terminal.compression(COMPRESSION), width=width)
    assert max(map(len, shown.splitlines())) <= width
    packed = "".join(shown.split())
    for word in ("size:1.09MB→310kB,3.52×smaller", "91.42%", "SQNR:31.2dB,worst", "0.9996"):
        assert word in packed


def test_what_is_no_terminal_gets_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.show(terminal.compression(COMPRESSION))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert all(line == line.rstrip() for line in shown.splitlines())


def test_errors_have_their_hint_on_a_line_of_its_own() -> None:
    assert text(console.error("it [broke]", "Mend it.")) == "error: it [broke]\nMend it.\n"
    assert text(console.error("it broke", None)) == "error: it broke\n"
