"""Recipes: how to compress, as a TOML file that can be kept, shared and run again.

A recipe holds no paths of models or data, so one recipe serves many models::

    schema_version = 1
    passes = ["prune", "quant"]
    target = "x86-vnni"

    [gates]
    min_agreement = 0.99

    [options.prune]
    macs = 0.7

It holds what the user set; everything else takes its default when the recipe is run.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from onnxcompress.calibration.sources import ImageOptions
from onnxcompress.errors import UsageError
from onnxcompress.output import SideFile, check_side_file, write_side_file
from onnxcompress.passes import pass_class
from onnxcompress.verification.gates import Gates

SCHEMA_VERSION = 1
_MOST_THREADS = 256
_T = TypeVar("_T")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides a result, apart from the model and its data.

    Attributes:
        passes: Pass names as the user typed them.
        options: Pass name to option name to value, only what the user set.
        target: Name of the hardware profile, or "auto".
        provider: "cpu", "cuda" or "auto".
        threads: Threads of onnxruntime; None takes all cores for calibration and one for latency.
        batch_size: Samples per run during calibration and verification.
        seed: Seed of everything random.
        calib_samples: Most samples to calibrate on.
        eval_samples: Most samples to verify on; None takes all.
        image: How to read folders of images; None for the defaults.
        gates: Limits that the result has to keep.
        simplify: Whether to simplify first.
        fold: Whether to fold constants and normalizations first.
        names: What nodes and values inside the result are called: "short" keeps the names of the
            original and shortens those that passes made, "all" shortens both, "keep" none.
    """

    passes: tuple[str, ...] = ()
    options: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    target: str = "auto"
    provider: str = "cpu"
    threads: int | None = None
    batch_size: int = 8
    seed: int = 0
    calib_samples: int = 1024
    eval_samples: int | None = None
    image: ImageOptions | None = None
    gates: Gates = field(default_factory=Gates)
    simplify: bool = True
    fold: bool = True
    names: Literal["short", "all", "keep"] = "short"

    def __post_init__(self) -> None:
        for name in ("batch_size", "calib_samples", "eval_samples", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name.replace('_', '-')} must be at least 1, not {value}")
        if self.seed < 0:
            raise UsageError(f"seed must be at least 0, not {self.seed}")
        check_threads(self.threads or 0)

    def to_dict(self) -> dict[str, object]:
        """The recipe as nested plain values; what is None or empty is left out."""
        made: dict[str, object] = {"schema_version": SCHEMA_VERSION}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                value = {k: v for k, v in dataclasses.asdict(value).items() if v is not None}
            elif isinstance(value, Mapping):
                value = {owner: _typed(owner, values) for owner, values in value.items() if values}
            if value is not None and value != {}:
                made[f.name] = list(value) if isinstance(value, tuple) else value
        return made


def check_threads(count: int) -> None:
    """Refuse a number of threads that makes no sense; 0 stands for all cores.

    Raises:
        UsageError: If it is negative, or so many that starting them would take minutes.
    """
    cores = os.cpu_count() or 1
    if not 0 <= count <= max(_MOST_THREADS, cores):
        raise UsageError(
            f"threads must be between 1 and {max(_MOST_THREADS, cores)}, not {count}",
            hint=f"This machine has {cores} cores.",
        )


def _typed(owner: str, values: Mapping[str, object]) -> dict[str, object]:
    """Options as TOML values: "0.5" from ``--set`` becomes 0.5, None the string "none"."""
    parsed = pass_class(owner).options_type.parse(values, owner=owner).to_dict()
    return {name: parsed.get(name, "none") for name in values}


def load_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        UsageError: If the file cannot be read, is not TOML, or holds something that is no part of a
            recipe.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe '{path}' cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"recipe '{path}' is not valid TOML: {error}") from error
    version = values.pop("schema_version", SCHEMA_VERSION)
    if type(version) is not int or version != SCHEMA_VERSION:
        raise UsageError(
            f"recipe '{path}' has schema_version {version!r}; this version reads {SCHEMA_VERSION}",
            hint="Use the version of onnxcompress that wrote it.",
        )
    where = f"recipe '{path}'"
    if "gates" in values:
        values["gates"] = _section(Gates, values["gates"], f"{where}, [gates]")
    if "image" in values:
        values["image"] = _section(ImageOptions, values["image"], f"{where}, [image]")
    return _section(Recipe, values, where)


def _section(kind: type[_T], values: object, where: str) -> _T:
    """Make a dataclass from a TOML table, checking every name and type."""
    if not isinstance(values, Mapping):
        raise UsageError(f"{where} must be a table")
    hints = typing.get_type_hints(kind)
    made: dict[str, object] = {}
    for name, value in values.items():
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            guess = f"Did you mean '{near[0]}'? " if near else ""
            raise UsageError(
                f"{where} has no entry '{name}'", hint=f"{guess}Known: {', '.join(hints)}."
            )
        made[name] = _fit(value, hints[name], f"{where}, '{name}'")
    return kind(**made)


def _fit(value: object, hint: object, where: str) -> object:
    """Check that a TOML value is of the type ``hint``; arrays become tuples."""
    if isinstance(hint, types.UnionType):
        hint = next(member for member in typing.get_args(hint) if member is not type(None))
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value in members:
            return value
        raise UsageError(f"{where} must be one of {', '.join(map(str, members))}, not {value!r}")
    if origin is tuple and isinstance(value, list):
        if members[-1] is not Ellipsis and len(value) != len(members):
            raise UsageError(f"{where} must have {len(members)} entries, not {len(value)}")
        return tuple(_fit(element, members[0], where) for element in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    wanted = origin or hint
    if isinstance(wanted, type) and type(value) is not bool and isinstance(value, wanted):
        if origin is Mapping:
            return {
                key: _fit(member, members[1], f"{where}, '{key}'") for key, member in _items(value)
            }
        return value
    if wanted is bool and isinstance(value, bool):
        return value
    if wanted is object:
        return value
    names = {Mapping: "a table", tuple: "an array", str: "a string", int: "a whole number"}
    name = names.get(typing.cast(type, wanted), getattr(wanted, "__name__", str(wanted)))
    raise UsageError(f"{where} must be {name}, not {value!r}")


def _items(value: object) -> Iterable[tuple[str, object]]:
    return typing.cast("Mapping[str, object]", value).items()


def merge_options(
    base: Mapping[str, Mapping[str, object]], over: Mapping[str, Mapping[str, object]]
) -> dict[str, dict[str, object]]:
    """Options of ``base`` with those of ``over`` put over them, option by option."""
    return {owner: {**base.get(owner, {}), **over.get(owner, {})} for owner in {**base, **over}}


def parse_settings(settings: tuple[str, ...]) -> dict[str, dict[str, object]]:
    """Turn ``--set prune.macs=0.7`` strings into options.

    Raises:
        UsageError: If one is not of the form PASS.OPTION=VALUE, or sets the same option as another.
    """
    made: dict[str, dict[str, object]] = {}
    for setting in settings:
        match = re.fullmatch(r"\s*([\w-]+)\.([\w-]+)\s*=(.*)", setting, re.DOTALL)
        if match is None:
            raise UsageError(
                f"--set {setting} is not of the form PASS.OPTION=VALUE",
                hint="For example: --set prune.macs=0.7",
            )
        owner, name, value = match[1], match[2].replace("-", "_"), match[3].strip()
        if name in made.get(owner, {}):
            raise UsageError(f"--set gives {owner}.{name} twice")
        made.setdefault(owner, {})[name] = value
    return made


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as TOML.

    Raises:
        UsageError: If another file would be overwritten.
        OutputError: If the file cannot be written.
    """
    check_side_file(path, SideFile.RECIPE)
    write_side_file(path, SideFile.RECIPE, to_toml(recipe.to_dict()))


def to_toml(values: Mapping[str, object]) -> str:
    """Nested mappings of plain values as TOML text."""
    return "\n".join(_table(values, ())).lstrip("\n") + "\n"


def _table(values: Mapping[str, object], path: tuple[str, ...]) -> list[str]:
    lines: list[str] = []
    plain = {k: v for k, v in values.items() if not isinstance(v, Mapping)}
    if path and plain:
        lines += ["", f"[{'.'.join(_key(part) for part in path)}]"]
    lines += [f"{_key(name)} = {_value(value)}" for name, value in plain.items()]
    for name, value in values.items():
        if isinstance(value, Mapping):
            lines += _table(value, (*path, name))
    return lines


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _value(name)


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(v) for v in value)}]"
    raise TypeError(f"{value!r} has no TOML form")
