"""Reports for people: tables on stdout, in colour on a terminal, plain elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from onnxcompress.passes.base import Skip
from onnxcompress.passes.base import Table as Figures
from onnxcompress.report.console import console
from onnxcompress.report.units import (
    bytes_text,
    change_text,
    cosine_text,
    count_text,
    decibel_text,
    milliseconds_text,
    percent_text,
    plural,
    smaller_text,
)
from onnxcompress.result import CompressionResult, PassRun
from onnxcompress.verification.footprint import Footprint
from onnxcompress.verification.metrics import OutputFidelity
from onnxcompress.verification.side_by_side import Timing, Verification

_GOOD, _BAD, _DIM = "green", "red", "dim"
_NAMES_SHOWN = 3
_REASONS_SHOWN = 4
_ROWS_SHOWN = 10
_TABLE_WIDTH = 64


def compression(result: CompressionResult, *, verbose: bool = False) -> RenderableType:
    """The report of a run."""
    if result.dry_run:
        return Group(
            *_spaced(_passes(result, verbose=verbose), _remarks(result.notes, result.warnings))
        )
    assert result.verification is not None  # noqa: S101 - only a dry run has none
    return Group(
        *_spaced(
            _passes(result, verbose=verbose),
            _contributions(result),
            BeforeAfter(result.verification),
            _outputs(result.verification) if verbose else None,
            _measured_on(result.verification, result.calibration),
            _remarks(result.notes, result.warnings),
            _gates(result.verification, verbose=verbose),
        ),
        _destination(result),
    )


def verification(checked: Verification, *, verbose: bool = False) -> RenderableType:
    """The report of a comparison of two models."""
    several = len(checked.comparison.outputs) > 1
    return Group(
        *_spaced(
            BeforeAfter(checked),
            _outputs(checked) if verbose or several else None,
            _measured_on(checked, None),
            _remarks((), checked.warnings),
            _gates(checked, verbose=verbose),
        )
    )


def benchmark(timed: Verification) -> RenderableType:
    """The report of a timing of two models."""
    return Group(*_spaced(BeforeAfter(timed), _measured_on(timed, None)))


Row = tuple[str, str, str, Text]
"""What it is, the original's, the result's, and what to say about it."""


class BeforeAfter:
    """Original against result: a table, or one line per row where there is no room for one."""

    def __init__(self, checked: Verification) -> None:
        self._rows = (*_weights(checked), *_times(checked.timings), *_fidelity(checked))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width < _TABLE_WIDTH:
            yield from (self._line(*row) for row in self._rows)
            yield Text("")
            return
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
        table.add_column("", overflow="fold")
        table.add_column("original", justify="right", no_wrap=True)
        table.add_column("result", justify="right", no_wrap=True)
        table.add_column("", overflow="fold")
        for row in self._rows:
            table.add_row(*row)
        yield table

    @staticmethod
    def _line(name: str, before: str, after: str, remark: Text) -> Text:
        numbers = f"{before} → {after}" if before and after else before or after
        return Text.assemble((name, "bold"), f": {numbers}{', ' if remark else ''}", remark)


def _weights(checked: Verification) -> Iterator[Row]:
    a, b = checked.original, checked.result
    if b is None:
        yield "size", bytes_text(a.raw_bytes), "", Text("")
        return
    for name, before, after in (
        ("size", a.raw_bytes, b.raw_bytes),
        ("size, deflated", a.deflated_bytes, b.deflated_bytes),
    ):
        yield (
            name,
            bytes_text(before),
            bytes_text(after),
            _lower(before, after, smaller_text(before, after)),
        )
    for name, before, after in (
        ("parameters", a.parameters, b.parameters),
        ("MACs", a.macs, b.macs),
    ):
        yield (
            name,
            count_text(before),
            count_text(after),
            _lower(before, after, change_text(before, after)),
        )
    if a.peak_memory_bytes is not None and b.peak_memory_bytes is not None:
        yield _memory(a, b)
    if a.load_ms and b.load_ms:
        ratio = a.load_ms / b.load_ms
        change = f"{ratio:.2f}× faster" if ratio >= 1 else f"{1 / ratio:.2f}× longer"
        yield "load time", milliseconds_text(a.load_ms), milliseconds_text(b.load_ms), Text(change)


def _memory(a: Footprint, b: Footprint) -> Row:
    before, after = a.peak_memory_bytes or 0, b.peak_memory_bytes or 0
    change = _lower(before, after, change_text(before, after))
    return "peak memory", bytes_text(before), bytes_text(after), change


def _times(timings: Sequence[Timing]) -> Iterator[Row]:
    threads = {t.threads for t in timings}
    for t in timings:
        name = f"latency, batch {t.batch_size}"
        if len(threads) > 1 or t.threads != 1:
            name += f", {'all cores' if t.threads == 0 else plural(t.threads, 'thread')}"
        word, style = f"{t.speedup_ratio:.2f}×", ""
        if t.speedup_low_ratio > 1:
            word, style = f"{word} faster", _GOOD
        elif t.speedup_high_ratio < 1:
            word, style = f"{word}, slower", _BAD
        spread = f" ({t.speedup_low_ratio:.2f} to {t.speedup_high_ratio:.2f})"
        yield (
            name,
            milliseconds_text(t.original_ms),
            milliseconds_text(t.result_ms),
            Text.assemble((word, style), (spread, _DIM)),
        )


def _fidelity(checked: Verification) -> Iterator[Row]:
    found = checked.comparison
    if found.accuracy is not None:
        a = found.accuracy
        points = f"{a.difference_ratio * 100:+.2f} points".replace("-", "−")
        low, high = a.difference_low_ratio * 100, a.difference_high_ratio * 100
        interval = f" (95 %: {low:+.2f} to {high:+.2f})".replace("-", "−")
        style = _BAD if high < 0 else _GOOD if low > 0 else ""
        yield (
            "top-1",
            percent_text(a.original_ratio),
            percent_text(a.result_ratio),
            Text.assemble((points, style), (interval, _DIM)),
        )
    for agreement in found.agreements:
        top5 = "" if agreement.top5_ratio is None else f"top-5 {percent_text(agreement.top5_ratio)}"
        name = "agreement" + (f", {agreement.output}" if len(found.agreements) > 1 else "")
        yield name, "", percent_text(agreement.top1_ratio), Text(top5, _DIM)
    floats = [o for o in found.outputs if o.sqnr_db is not None and o.cosine is not None]
    if floats:
        yield _worst_sqnr(floats)
        yield _worst_cosine(floats)
    elif found.outputs:
        equal = min(o.equal_ratio for o in found.outputs)
        yield "equal elements", "", percent_text(equal), Text("")


def _worst_sqnr(floats: Sequence[OutputFidelity]) -> Row:
    worst = min(floats, key=lambda o: o.sqnr_db or 0.0)
    sample = ""
    if worst.worst_sqnr_db is not None and worst.worst_sqnr_db != worst.sqnr_db:
        sample = f"worst sample {decibel_text(worst.worst_sqnr_db)}"
    return f"SQNR{_of(worst, floats)}", "", decibel_text(worst.sqnr_db or 0.0), Text(sample, _DIM)


def _worst_cosine(floats: Sequence[OutputFidelity]) -> Row:
    worst = min(floats, key=lambda o: o.cosine or 0.0)
    sample = ""
    if worst.worst_cosine is not None and worst.worst_cosine != worst.cosine:
        sample = f"worst sample {cosine_text(worst.worst_cosine)}"
    return f"cosine{_of(worst, floats)}", "", cosine_text(worst.cosine or 0.0), Text(sample, _DIM)


def _of(output: OutputFidelity, among: Sequence[OutputFidelity]) -> str:
    return f", {output.name}" if len(among) > 1 else ""


def _lower(before: float, after: float, text: str) -> Text:
    """A change where less is better."""
    return Text(text, "" if before == after else _GOOD if after < before else _BAD)


def _outputs(checked: Verification) -> Table | None:
    """Every output with its metrics."""
    if not checked.comparison.outputs:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("output", overflow="fold")
    for name in ("max error", "mean error", "SQNR", "cosine", "equal"):
        table.add_column(name, justify="right", overflow="fold")
    for o in checked.comparison.outputs:
        table.add_row(
            Text(o.name),
            "" if o.max_abs_error is None else f"{o.max_abs_error:.3g}",
            "" if o.mean_abs_error is None else f"{o.mean_abs_error:.3g}",
            "" if o.sqnr_db is None else decibel_text(o.sqnr_db),
            "" if o.cosine is None else cosine_text(o.cosine),
            percent_text(o.equal_ratio),
        )
    return table


def _measured_on(checked: Verification, calibration: str | None) -> Text:
    """One line per kind of data, and how latency was measured."""
    lines = []
    if calibration is not None:
        lines.append(f"calibrated on {calibration}")
    samples = checked.comparison.samples
    lines.append(
        f"verified on {plural(samples, 'sample')}, {checked.data}"
        if samples
        else f"inputs: {checked.data}"
    )
    lines += [
        f"output '{a.output}' counts as a classifier's: {a.because}"
        for a in checked.comparison.agreements
    ]
    if checked.timings:
        threads = sorted({t.threads for t in checked.timings})
        shown = ", ".join("all cores" if n == 0 else plural(n, "thread") for n in threads)
        provider = checked.providers[0].removesuffix("ExecutionProvider")
        lines.append(f"latency in turns on {provider}, {shown}: median ratio (10 % to 90 %)")
    return Text("\n".join(lines), _DIM)


def _passes(result: CompressionResult, *, verbose: bool) -> RenderableType:
    """What each pass did, or would do."""
    blocks: list[RenderableType] = []
    for run in result.passes:
        count = plural(len(run.report.changes), "change")
        line = Text.assemble(
            (run.name, "bold"), f"  {'would make ' if result.dry_run else ''}{count}"
        )
        if not result.dry_run:
            line.append(f", {run.seconds:.1f} s", _DIM)
        if run.automatic:
            line.append("  (added)", _DIM)
        blocks.append(line)
        blocks += [Padding(detail, (0, 0, 0, 2)) for detail in _details(run, verbose=verbose)]
        blocks += [
            Padding(_rows(each, verbose=verbose), (1, 0, 0, 2)) for each in run.report.tables
        ]
    return Group(*blocks)


def _contributions(result: CompressionResult) -> RenderableType | None:
    """The model after each pass, beside the original; None where one pass was asked for."""
    runs = [(run, run.after) for run in result.passes if run.after is not None]
    if not runs:
        return None
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        header_style="bold",
        title="after each pass, beside the original",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("after")
    for name in ("weights", "MACs", "SQNR", "agreement", "speed"):
        table.add_column(name, justify="right")
    for run, after in runs:
        table.add_row(
            run.name,
            bytes_text(after.weight_bytes),
            count_text(after.macs),
            "-" if after.sqnr_db is None else decibel_text(after.sqnr_db),
            "-" if after.agreement_ratio is None else percent_text(after.agreement_ratio),
            "-" if after.speed_ratio is None else f"{after.speed_ratio:.2f}×",
        )
    samples = runs[-1][1].samples
    timed = any(after.speed_ratio is not None for _, after in runs)
    clock = "; speed by the processor time of one thread, batch 1" if timed else ""
    return Group(table, Text(f"on {plural(samples, 'sample')} of the evaluation data{clock}", _DIM))


def _rows(figures: Figures, *, verbose: bool) -> Table:
    """The first rows of a pass's own table."""
    shown = figures.rows if verbose else figures.rows[:_ROWS_SHOWN]
    more = len(figures.rows) - len(shown)
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        header_style="bold",
        title=figures.title,
        title_justify="left",
        title_style=_DIM,
        caption=f"and {more} more (-v shows all)" if more else None,
        caption_justify="left",
    )
    for number, name in enumerate(figures.columns):
        numeric = all(not isinstance(row[number], str) for row in figures.rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in shown:
        table.add_row(*(Text(cell if isinstance(cell, str) else f"{cell:g}") for cell in row))
    return table


def _details(run: PassRun, *, verbose: bool) -> Iterator[Text]:
    if run.report.figures:
        yield Text(
            ", ".join(
                f"{name.replace('_', ' ')} {_figure(value)}"
                for name, value in run.report.figures.items()
            )
        )
    for note in run.report.notes:
        yield Text(note)
    if verbose:
        for change in run.report.changes:
            where = f"{change.op_type} '{change.node}': ".lstrip() if change.node else ""
            yield Text(f"{where}{change.what}")
    groups = _grouped(run.report.skips)
    shown_groups = groups if verbose else dict(list(groups.items())[:_REASONS_SHOWN])
    for reason, skips in shown_groups.items():
        names = [f"{skip.op_type} '{skip.node}'".lstrip() for skip in skips if skip.node]
        shown = names if verbose else names[:_NAMES_SHOWN]
        more = "" if len(shown) == len(names) else f" and {len(names) - len(shown)} more"
        yield Text(f"{' '.join(['skipped', ', '.join(shown)]).rstrip()}{more}: {reason}", _DIM)
    if len(shown_groups) < len(groups):
        left = sum(len(skips) for skips in groups.values())
        left -= sum(len(skips) for skips in shown_groups.values())
        yield Text(f"skipped {left} more for other reasons (-v shows all)", _DIM)


def _figure(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _grouped(skips: Sequence[Skip]) -> dict[str, list[Skip]]:
    """Skips by reason, the most frequent reason first."""
    groups: dict[str, list[Skip]] = {}
    for skip in skips:
        groups.setdefault(skip.reason, []).append(skip)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _remarks(notes: Sequence[str], warnings: Sequence[str]) -> RenderableType | None:
    lines = [Text(note, _DIM) for note in notes]
    lines += [Text.assemble(("warning: ", "yellow"), warning) for warning in warnings]
    return Group(*lines) if lines else None


def _gates(checked: Verification, *, verbose: bool) -> RenderableType | None:
    """Whether the verification passed, and why not."""
    if checked.passed:
        kept = [g for g in checked.gates if g.passed]
        missed = [str(g) for g in checked.gates if not g.passed]
        lines = [Text(f"not enforced: {sentence}", "yellow") for sentence in missed]
        kind = "default gate" if any(g.by_default for g in kept) else "gates"
        if kept and not missed:
            lines.append(Text.assemble(("passed", f"bold {_GOOD}"), f" the {kind}"))
        if verbose:
            lines += [Text(f"  {gate}", _DIM) for gate in kept]
        return Group(*lines) if lines else None
    return Group(
        *(Text.assemble(("failed: ", f"bold {_BAD}"), failure) for failure in checked.failures)
    )


def _destination(result: CompressionResult) -> Text:
    if result.written:
        suffix = "" if result.passed else " (kept although it failed)"
        return Text.assemble("written to ", (str(result.output_path), "bold"), suffix)
    return Text(
        f"'{result.output_path}' was not written; --keep-failed writes it all the same", _BAD
    )


def _spaced(*blocks: RenderableType | None) -> Iterator[RenderableType]:
    """Blocks with a blank line after each; tables bring one of their own."""
    for block in blocks:
        if block is None:
            continue
        yield block
        if not isinstance(block, Table | BeforeAfter):
            yield Text("")


def show(page: RenderableType, paths: Sequence[Path] = ()) -> None:
    """Print a page to stdout, under the names of the files that it is about."""
    stdout = console()
    if paths:
        title = Text(" → ".join(str(path) for path in paths), "bold", overflow="fold")
        page = Group(title, Text(""), page)
    if stdout.is_terminal:
        stdout.print(page)
        return
    with (
        stdout.capture() as captured
    ):  # tables fill their lines with blanks, which files need not keep
        stdout.print(page)
    for line in captured.get().splitlines():
        stdout.print(line.rstrip(), markup=False, soft_wrap=True)
