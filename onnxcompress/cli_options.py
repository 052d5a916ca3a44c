"""The options of the command line, in sections, and how they become a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

if TYPE_CHECKING:
    from onnxcompress.calibration.sources import ImageOptions
    from onnxcompress.progress import Progress
    from onnxcompress.recipe import Recipe
    from onnxcompress.search.parallel import Workers
    from onnxcompress.verification.gates import Gates

_F = TypeVar("_F", bound=Callable[..., object])
Given = Mapping[str, object]

PATH = click.Path(path_type=Path)
PROVIDERS = ("cpu", "cuda", "auto")
BACKENDS = ("loky", "dask", "ray")
IMAGE_LAYOUTS = ("auto", "NCHW", "NHWC")
IMAGE_CHANNELS = ("auto", "RGB", "BGR", "L")
IMAGE_FITS = ("crop", "stretch")
IMAGE_RESAMPLES = ("nearest", "bilinear", "bicubic", "lanczos")

_COUNT = click.IntRange(1)


class Numbers(click.ParamType):  # type: ignore[type-arg]  # generic in click's newest only
    """Numbers with a separator between them.

    Args:
        name: What the help shows.
        whole: Whether they must be whole numbers.
        separator: What stands between them.
    """

    def __init__(self, name: str, *, whole: bool, separator: str = ",") -> None:
        self.name = name
        self._type: type[int] | type[float] = int if whole else float
        self._separator = separator

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Parse the text."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._type(part) for part in str(value).lower().split(self._separator))
        except ValueError:
            self.fail(f"{value!r} is not of the form {self.name}", param, ctx)


class _Option(click.Option):
    """An option that knows its section of the help."""

    def __init__(self, names: list[str], *, section: str, **attributes: object) -> None:
        super().__init__(names, **attributes)  # type: ignore[arg-type]  # click checks its attributes
        self.section = section


class SectionedCommand(click.Command):
    """A command whose help lists its options in sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections."""
        write_options(self, ctx, formatter)


def write_options(
    command: click.Command, ctx: click.Context, formatter: click.HelpFormatter
) -> None:
    """Write the options of a command in sections, in the order they were declared."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is not None and isinstance(parameter, click.Option):
            sections.setdefault(getattr(parameter, "section", "Help"), []).append(record)
    for title, records in sections.items():
        with formatter.section(title):
            formatter.write_dl(records)


def _section(title: str, *options: tuple[str, dict[str, Any]]) -> Callable[[_F], _F]:
    """A decorator that adds options, given as names ("-v --verbose") and attributes."""

    def decorate(command: _F) -> _F:
        for names, attributes in reversed(options):
            attributes = {**attributes, "cls": _Option, "section": title}
            command = click.option(*names.split(), **attributes)(command)
        return command

    return decorate


def _option(names: str, text: str, **attributes: object) -> tuple[str, dict[str, Any]]:
    return names, {"help": text, **attributes}


recipe_options = _section(
    "What to do",
    _option(
        "--passes",
        "Passes, comma-separated, in any order. 'onnxcompress passes' lists them.",
        metavar="NAMES",
    ),
    _option(
        "--set",
        "Set an option of a pass; may be repeated.",
        multiple=True,
        metavar="PASS.OPTION=VALUE",
        default=(),
    ),
    _option(
        "--recipe",
        "Take passes and options from a TOML file; the command line goes first.",
        type=PATH,
    ),
    _option("--save-recipe", "Write what was asked for as such a file.", type=PATH),
    _option(
        "--target",
        "Hardware to compress for: auto (this machine, the default), x86-vnni, x86-avx2, arm64, "
        "cuda, tensorrt, qnn, openvino, mobile or generic.",
        metavar="NAME",
    ),
    _option("--no-simplify", "Do not add the simplify pass.", is_flag=True),
    _option("--no-fold", "Do not add the fold pass.", is_flag=True),
    _option(
        "--names",
        "What is inside the result: 'short' (default) keeps the names of the original and shortens "
        "those that passes made, 'all' shortens both, 'keep' none.",
        type=click.Choice(["short", "all", "keep"]),
    ),
)

_EVALUATION = (
    _option(
        "--eval evaluation",
        "Samples to verify on, in the same forms; by default IN.eval.npz beside the model, else "
        "invented ones.",
        metavar="DATA",
    ),
    _option(
        "--labels", "Class numbers of these samples (.npy), for top-1 before and after.", type=PATH
    ),
    _option(
        "--eval-samples", "Most samples to verify on; all by default.", type=_COUNT, metavar="N"
    ),
)

data_options = _section(
    "Data",
    _option(
        "--calib",
        "Samples to calibrate on: .npz, .npy, a folder of these, of images or of ONNX test data, "
        "or module:function; by default IN.calib.npz beside the model.",
        metavar="DATA",
    ),
    _option(
        "--calib-samples",
        "Calibrate on at most so many; 1024 by default.",
        type=_COUNT,
        metavar="N",
    ),
    *_EVALUATION,
)

evaluation_options = _section("Data", *_EVALUATION)

image_options = _section(
    "Folders of images: x = (pixel - mean) / std, pixels of 0 to 255",
    _option(
        "--image-size",
        "By default that of the model's input.",
        type=Numbers("HEIGHTxWIDTH", whole=True, separator="x"),
        metavar="HEIGHTxWIDTH",
    ),
    _option(
        "--image-mean",
        "One number, or one per channel; 0 by default.",
        type=Numbers("R,G,B", whole=False),
    ),
    _option(
        "--image-std",
        "One number, or one per channel; 255 by default.",
        type=Numbers("R,G,B", whole=False),
    ),
    _option("--image-layout", "Order of the input's axes.", type=click.Choice(IMAGE_LAYOUTS)),
    _option("--image-channels", "Order of the channels.", type=click.Choice(IMAGE_CHANNELS)),
    _option("--image-fit", "Cut to the size, or stretch.", type=click.Choice(IMAGE_FITS)),
    _option("--image-resample", "Interpolation.", type=click.Choice(IMAGE_RESAMPLES)),
)

gate_options = _section(
    "Limits of the result; by default agreement 0.5, or cosine 0.9 without classes",
    _option("--min-sqnr", "Least SQNR of every output, in dB.", type=float, metavar="DB"),
    _option("--min-cosine", "Least cosine of every output.", type=float, metavar="RATIO"),
    _option(
        "--min-agreement",
        "Least share of samples with the same top class.",
        type=float,
        metavar="RATIO",
    ),
    _option(
        "--max-drop",
        "Most top-1 that may be lost (0.01 is one point).",
        type=float,
        metavar="RATIO",
    ),
    _option("--no-gate", "Report missed limits, but do not fail.", is_flag=True),
)

_PROVIDER = _option(
    "--provider", "Where to run models; cpu by default.", type=click.Choice(PROVIDERS)
)

running_options = _section(
    "Running",
    _PROVIDER,
    _option(
        "--threads",
        "Threads of onnxruntime; by default all cores, and one for latency.",
        type=_COUNT,
        metavar="N",
    ),
    _option("--batch-size", "Samples per run; 8 by default.", type=_COUNT, metavar="N"),
    _option("--seed", "Seed of everything random; 0 by default.", type=int, metavar="N"),
    _option("--no-bench", "Do not measure latency and memory.", is_flag=True),
)

worker_options = _section(
    "Searching; the result is the same with any number of processes",
    _option(
        "--jobs",
        "Processes that measure versions of the model; by default all cores where it is worth it.",
        type=_COUNT,
        metavar="N",
    ),
    _option(
        "--backend",
        "loky: processes on this machine (default); dask or ray: a cluster.",
        type=click.Choice(BACKENDS),
    ),
)

bench_options = _section(
    "Running",
    _option(
        "--eval evaluation",
        "Inputs; by default those beside A, else invented ones.",
        metavar="DATA",
    ),
    _PROVIDER,
    _option(
        "--threads",
        "Numbers of threads to measure with; 0 takes all cores.",
        type=Numbers("N,...", whole=True),
        default="1",
        show_default=True,
    ),
    _option(
        "--batch-size",
        "Samples per run.",
        type=Numbers("N,...", whole=True),
        default="1,8",
        show_default=True,
    ),
)

_REPORTING = (
    _option(
        "--json",
        "Write the report as JSON; without FILE (or as --json=-) to stdout in place of the tables.",
        is_flag=False,
        flag_value="-",
        metavar="[FILE]",
    ),
    _option("-v --verbose", "Show every change, skip and output.", is_flag=True),
    _option("-q --quiet", "Show nothing but errors.", is_flag=True),
    _option("--debug", "Show tracebacks of errors.", is_flag=True),
)

report_options = _section("Report", *_REPORTING)

output_options = _section(
    "Output",
    _option("--keep-failed", "Write OUT even when it fails its limits.", is_flag=True),
    _option("--dry-run", "Say what would be done, and write nothing.", is_flag=True),
    *_REPORTING,
)


def build_recipe(given: Given) -> Recipe:
    """The recipe file, if one is given, with the options of the command line put over it.

    Raises:
        UsageError: If the file or an option cannot be understood.
    """
    from onnxcompress import recipe

    file = path(given, "recipe")
    base = recipe.Recipe() if file is None else recipe.load_recipe(file)
    over: dict[str, object] = {
        name: given[name]
        for name in (
            "target",
            "provider",
            "threads",
            "batch_size",
            "seed",
            "calib_samples",
            "eval_samples",
            "names",
        )
        if given.get(name) is not None
    }
    named = text(given, "passes")
    if named is not None:
        over["passes"] = tuple(part.strip() for part in named.split(",") if part.strip())
    settings = recipe.parse_settings(cast("tuple[str, ...]", given.get("set", ())))
    over["options"] = recipe.merge_options(base.options, settings)
    over["gates"] = _gates(base.gates, given)
    over["image"] = _image(base.image, given)
    for name in ("simplify", "fold"):
        if given.get(f"no_{name}"):
            over[name] = False
    return dataclasses.replace(base, **over)  # type: ignore[arg-type]  # each is of its field's type


def _gates(base: Gates, given: Given) -> Gates:
    names = {
        "min_sqnr": "min_sqnr_db",
        "min_cosine": "min_cosine",
        "min_agreement": "min_agreement",
        "max_drop": "max_drop",
    }
    over: dict[str, object] = {
        field: given[name] for name, field in names.items() if given.get(name) is not None
    }
    if given.get("no_gate"):
        over["enforced"] = False
    return dataclasses.replace(base, **over)  # type: ignore[arg-type]  # each is of its field's type


def _image(base: ImageOptions | None, given: Given) -> ImageOptions | None:
    from onnxcompress.calibration.sources import ImageOptions

    over = {
        name.removeprefix("image_"): value
        for name, value in given.items()
        if name.startswith("image_") and value is not None
    }
    if not over:
        return base
    size = over.get("size")
    if isinstance(size, tuple) and len(size) == 1:
        over["size"] = (size[0], size[0])
    elif isinstance(size, tuple) and len(size) != 2:
        raise click.UsageError("--image-size is HEIGHTxWIDTH, or one number for both")
    return dataclasses.replace(base or ImageOptions(), **over)  # type: ignore[arg-type]  # as above


def check_side_files(given: Given) -> None:
    """Refuse places of the report and the recipe that cannot work, before anything is computed.

    Raises:
        UsageError: If one of them would overwrite a file of another kind, or both are the same.
        OutputError: If one of them cannot be written.
    """
    from onnxcompress.output import SideFile, check_side_file

    report, saved = text(given, "json"), path(given, "save_recipe")
    if report is not None and report != "-":
        check_side_file(Path(report), SideFile.REPORT)
        if saved is not None and saved.resolve() == Path(report).resolve():
            raise click.UsageError(f"--json and --save-recipe name the same file '{saved}'")
    if saved is not None:
        check_side_file(saved, SideFile.RECIPE)


def workers(given: Given) -> Workers:
    """How many processes search, and where."""
    from onnxcompress.search.parallel import Backend, Workers

    jobs = given.get("jobs")
    return Workers(
        jobs=None if jobs is None else int(cast("int", jobs)),
        backend=Backend(text(given, "backend") or "loky"),
    )


def text(given: Given, name: str) -> str | None:
    """An option that is a string."""
    value = given.get(name)
    return None if value is None else str(value)


def path(given: Given, name: str) -> Path | None:
    """An option that is a path."""
    value = given.get(name)
    return value if isinstance(value, Path) else None


def numbers(given: Given, name: str) -> tuple[int, ...]:
    """An option that is a list of whole numbers."""
    return cast("tuple[int, ...]", given[name])


def progress(given: Given) -> Progress:
    """Where to report progress: stderr."""
    from onnxcompress.report.console import console
    from onnxcompress.report.progress import TerminalProgress

    return TerminalProgress(
        console(stderr=True), verbose=bool(given["verbose"]), quiet=bool(given["quiet"])
    )
