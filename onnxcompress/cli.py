"""The command line: parse, call, exit code; no logic.

Exit codes: 0 done, 1 the result failed its verification, 2 the request cannot be understood, 3 the
model, the data or the machine cannot do what was asked (an internal error is one of these). Above
128 a signal ended it: 130 Ctrl-C, 141 nobody reads stdout any more, 143 terminated.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

import onnxcompress
from onnxcompress import cli_options as opt
from onnxcompress.errors import OnnxCompressError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import RenderableType

    from onnxcompress.report.json import Plain

EXIT_UNUSABLE = 3
EXIT_INTERRUPTED = 130
EXIT_PIPE = 141
_SIGNAL_BASE = 128

_EXAMPLES = """\b
Examples:
  onnxcompress model.onnx small.onnx --passes quant
  onnxcompress model.onnx small.onnx --passes quant,prune --calib calib.npz \\
      --eval test.npz --labels labels.npy --set prune.macs=0.7 --max-drop 0.01
  onnxcompress model.onnx small.onnx --passes prune --dry-run
  onnxcompress verify model.onnx small.onnx --eval test.npz --min-agreement 0.99
  onnxcompress inspect model.onnx --groups
  onnxcompress bench model.onnx small.onnx --threads 1,4
  onnxcompress passes quant
"""


class _DefaultGroup(click.Group):
    """A group whose first argument may be a model in place of a command: then it compresses."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put ``compress`` in front of arguments that name no command."""
        own = {"--help", "-h", "--version"}
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["compress", *args]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the options of ``compress`` too, which is what most users look for."""
        compress = self.commands["compress"]
        opt.write_options(compress, ctx, formatter)
        self.format_commands(ctx, formatter)


@click.group(
    cls=_DefaultGroup,
    epilog=_EXAMPLES,
    options_metavar="",
    subcommand_metavar="IN OUT --passes NAMES [OPTIONS] | COMMAND [ARGS]",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(onnxcompress.__version__, prog_name="onnxcompress")
def cli() -> None:
    """Make trained ONNX models smaller and faster without retraining, and say what it cost.

    IN is compressed to OUT, both are run on the same inputs, and OUT is written only when the
    result keeps its limits.
    """


@cli.command(cls=opt.SectionedCommand, epilog=_EXAMPLES)
@click.argument("original", metavar="IN", type=opt.PATH)
@click.argument("output", metavar="OUT", type=opt.PATH)
@opt.recipe_options
@opt.data_options
@opt.image_options
@opt.gate_options
@opt.running_options
@opt.worker_options
@opt.output_options
def compress(original: Path, output: Path, **given: object) -> int:
    """Compress the model IN to OUT and verify the result."""
    from onnxcompress import pipeline, recipe
    from onnxcompress.report import json, terminal

    opt.check_side_files(given)
    asked = opt.build_recipe(given)
    if (save_to := opt.path(given, "save_recipe")) is not None:
        recipe.save_recipe(asked, save_to)
    with _stdout_kept():
        result = pipeline.run_recipe(
            original,
            output,
            asked,
            calib=opt.text(given, "calib"),
            evaluation=opt.text(given, "evaluation"),
            labels=opt.path(given, "labels"),
            keep_failed=bool(given["keep_failed"]),
            dry_run=bool(given["dry_run"]),
            measure=not given["no_bench"],
            workers=opt.workers(given),
            progress=opt.progress(given),
        )
    verbose = bool(given["verbose"])
    _show(
        given,
        (original, output),
        terminal.compression(result, verbose=verbose),
        json.compression_report(result),
    )
    return result.exit_code


@cli.command(cls=opt.SectionedCommand)
@click.argument("original", metavar="A", type=opt.PATH)
@click.argument("result", metavar="B", type=opt.PATH)
@opt.evaluation_options
@opt.image_options
@opt.gate_options
@opt.running_options
@opt.report_options
def verify(original: Path, result: Path, **given: object) -> int:
    """Run A and B on the same inputs and say how far B is from A."""
    from onnxcompress import api
    from onnxcompress.report import json, terminal

    opt.check_side_files(given)
    asked = opt.build_recipe(given)
    with _stdout_kept():
        checked = api.verify(
            original,
            result,
            opt.text(given, "evaluation"),
            labels=opt.path(given, "labels"),
            gates=asked.gates,
            provider=asked.provider,
            threads=asked.threads,
            batch_size=asked.batch_size,
            samples=asked.eval_samples,
            seed=asked.seed,
            image=asked.image,
            measure=not given["no_bench"],
            progress=opt.progress(given),
        )
    _show(
        given,
        (original, result),
        terminal.verification(checked, verbose=bool(given["verbose"])),
        json.verification_report(checked, original, result),
    )
    return 0 if checked.passed else 1


@cli.command()
@click.argument("original", metavar="A", type=opt.PATH)
@click.argument("result", metavar="B", type=opt.PATH)
@opt.bench_options
@opt.report_options
def bench(original: Path, result: Path, **given: object) -> int:
    """Time A and B in turns on the same inputs.

    Their outputs are not compared.
    """
    from onnxcompress import api
    from onnxcompress.report import json, terminal

    opt.check_side_files(given)
    with _stdout_kept():
        timed = api.benchmark(
            original,
            result,
            opt.text(given, "evaluation"),
            provider=str(given["provider"] or "cpu"),
            threads=opt.numbers(given, "threads"),
            batch_sizes=opt.numbers(given, "batch_size"),
            progress=opt.progress(given),
        )
    _show(
        given,
        (original, result),
        terminal.benchmark(timed),
        json.benchmark_report(timed, original, result),
    )
    return 0


@cli.command()
@click.argument("model", metavar="MODEL", type=opt.PATH)
@click.option("--groups", is_flag=True, help="List coupled channels, and what keeps the others.")
@click.option("--profile", is_flag=True, help="Measure the share of each node in the time.")
@click.option(
    "--eval",
    "data",
    metavar="DATA",
    help="Inputs for --profile, as for compress (default: MODEL.eval.npz, else invented ones).",
)
@click.option("--savings", is_flag=True, help="Say what each pass could do to each node.")
@click.option("--target", default="auto", show_default=True, help="Hardware for --savings.")
@click.option(
    "--top", type=click.IntRange(0), default=10, show_default=True, help="Nodes and groups to list."
)
@opt.report_options
def inspect(
    model: Path,
    groups: bool,
    profile: bool,
    data: str | None,
    savings: bool,
    target: str,
    top: int,
    **given: object,
) -> int:
    """Show what is in MODEL: inputs, outputs, operators, cost."""
    from onnxcompress import inspection
    from onnxcompress.report import inspection as pages
    from onnxcompress.report import json

    opt.check_side_files(given)
    with _stdout_kept():
        found = inspection.inspect(
            model,
            groups=groups,
            profile=profile,
            savings=savings,
            data=data,
            target=target,
            top=top,
            progress=opt.progress(given),
        )
    _show(given, (model,), pages.inspection(found), json.inspection_report(found))
    return 0


@cli.command()
@click.argument("name", metavar="[NAME]", required=False)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def passes(name: str | None, debug: bool) -> int:
    """List the passes, or the options of one."""
    from onnxcompress.passes import pass_class, pass_table
    from onnxcompress.report import inspection as pages
    from onnxcompress.report import terminal

    del debug  # main() looks for it
    page = (
        pages.pass_list([pass_class(n) for n in pass_table()])
        if name is None
        else pages.pass_page(pass_class(name))
    )
    with _to_a_reader():
        terminal.show(page)
    return 0


def _stdout_kept() -> contextlib.AbstractContextManager[object]:
    """What others print while a command works (a function that gives samples) goes to stderr."""
    return contextlib.redirect_stdout(sys.stderr)


def _show(
    given: Mapping[str, object],
    paths: Sequence[Path],
    page: RenderableType,
    report: Mapping[str, Plain],
) -> None:
    """Print the page, or the report in its place; write the report to a file when asked to."""
    from onnxcompress.report import json, terminal

    target = opt.text(given, "json")
    if target == "-":
        with _to_a_reader():
            click.echo(json.dumps(report), nl=False)
        return
    if target is not None:
        json.write(report, Path(target))
    if not given["quiet"]:
        with _to_a_reader():
            terminal.show(page, paths)


class _NobodyReadsError(Exception):
    """The other end of stdout is closed."""


@contextlib.contextmanager
def _to_a_reader() -> Iterator[None]:
    """Write to stdout; when nobody reads it any more, say so before click makes it exit code 1."""
    try:
        yield
        if sys.stdout is not None:  # it is None where the caller closed it
            sys.stdout.flush()
    except BrokenPipeError as error:
        raise _NobodyReadsError from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    if not logging.root.handlers:  # else what libraries log ends up on stderr
        logging.root.addHandler(logging.NullHandler())
    args = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without "×" shall not end the run
    with _leaving_on_signals() as interrupted:
        return _run(args, interrupted)


def _run(args: list[str], interrupted: threading.Event) -> int:
    def fail(message: str, hint: str | None, code: int) -> int:
        return _interrupted() if interrupted.is_set() else _fail(args, message, hint, code)

    try:
        code = cli.main(args, prog_name="onnxcompress", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _interrupted()
    except OnnxCompressError as error:
        return fail(error.message, error.hint, error.exit_code)
    except MemoryError:
        hint = "Use a smaller --batch-size."
        return fail("there is not enough memory", hint, EXIT_UNUSABLE)
    except _NobodyReadsError:  # whoever read the report has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except OSError as error:
        message = str(error.strerror or error) + (f": {error.filename}" if error.filename else "")
        return fail(message, None, EXIT_UNUSABLE)
    except Exception as error:  # noqa: BLE001 - the last resort: a bug of ours is told in one line
        message = f"internal error, {type(error).__name__}: {error}"
        hint = "This is a bug. Please report it with what the same command shows with --debug."
        return fail(message, hint, EXIT_UNUSABLE)
    return code if isinstance(code, int) else 0


def _interrupted() -> int:
    click.echo("interrupted", err=True)
    return EXIT_INTERRUPTED


def _fail(args: Sequence[str], message: str, hint: str | None, code: int) -> int:
    from onnxcompress.report.console import console, error

    if "--debug" in args:
        traceback.print_exc()
    console(stderr=True).print(error(message, hint), soft_wrap=True)
    return code


@contextlib.contextmanager
def _leaving_on_signals() -> Iterator[threading.Event]:
    """Let signals leave through every ``finally``, so that no partial file stays.

    Yields:
        Whether Ctrl-C was pressed. Libraries that are interrupted while they are imported turn it
        into errors of their own, which are none then.
    """
    interrupted = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(_SIGNAL_BASE + number)

    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # signals are somebody else's
        return
    handlers = {"SIGINT": interrupt, "SIGTERM": leave, "SIGHUP": leave}  # Windows has no SIGHUP
    wanted = {getattr(signal, name): h for name, h in handlers.items() if hasattr(signal, name)}
    previous = {number: signal.getsignal(number) for number in wanted}
    for number, handler in wanted.items():
        if previous[number] not in {signal.SIG_IGN, None}:  # ignored, as under nohup
            signal.signal(number, handler)
    try:
        yield interrupted
    finally:
        for number, before in previous.items():
            if before is not None:  # of a handler that is not Python's
                signal.signal(number, before)
