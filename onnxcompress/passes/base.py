"""What a pass is: its contract, its options and its report."""

from __future__ import annotations

import dataclasses
import enum
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self, TypeVar, runtime_checkable

import onnx_ir as ir

from onnxcompress.calibration.statistics import Statistic
from onnxcompress.context import PassContext
from onnxcompress.errors import UsageError
from onnxcompress.targets import Target


class Stage(enum.IntEnum):
    """When a pass runs. The pipeline sorts by stage, so users need not know an order.

    What shares weights comes last, for it decides only how weights are stored: a pass that rounded
    them afterwards would find codes instead of weights, or undo the sharing.
    """

    PREPARE = 10
    STRUCTURE = 20
    FACTORIZE = 30
    RECOVER = 40
    PRECISION = 60
    SHARE = 70
    STORAGE = 80


@dataclass(frozen=True, slots=True)
class Change:
    """Something a pass did.

    Attributes:
        node: Name of the node or initializer.
        op_type: Its operator, "" for an initializer.
        what: What was done, as a past participle clause ("folded into Conv 'conv1'").
        saved_bytes: Bytes of constants that this takes away; None where that is not known (in a
            plan, before anything is measured).
    """

    node: str
    op_type: str
    what: str
    saved_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Skip:
    """Something a pass would have treated but could not.

    Attributes:
        node: Name of the node or initializer.
        op_type: Its operator, "" for an initializer.
        reason: Why, in words a user can act on.
    """

    node: str
    op_type: str
    reason: str


@dataclass(frozen=True, slots=True)
class Table:
    """Figures in rows. The terminal shows the first rows, the JSON report all.

    Attributes:
        title: What is shown, with the units.
        columns: Names of the columns.
        rows: The most interesting row first; as many cells as columns.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | int | float, ...], ...]


@dataclass(frozen=True, slots=True)
class PassReport:
    """What a pass changed, what it skipped and why, and figures of its own.

    Attributes:
        changes: Everything done.
        skips: Everything that could not be treated, with the reason. Never a silent ``continue``.
        figures: Named figures for the report, with the unit in the name (``{"macs_kept_ratio":
        0.8}``). notes: Remarks for the user, one sentence each.
        tables: Figures that do not fit into one line.
    """

    changes: tuple[Change, ...] = ()
    skips: tuple[Skip, ...] = ()
    figures: Mapping[str, float | int | str] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()


_T = TypeVar("_T")


def option(
    default: _T,
    help: str,  # noqa: A002 - the word users know from --help
    *,
    minimum: float | None = None,
    maximum: float | None = None,
) -> _T:
    """Declare one field of a :class:`PassOptions`.

    Args:
        default: Value when the user says nothing.
        help: One sentence for ``onnxcompress passes``.
        minimum: Smallest number allowed (inclusive).
        maximum: Largest number allowed (inclusive).
    """
    metadata = {"help": help, "minimum": minimum, "maximum": maximum}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassOptions:
    """Base of every pass's options: a frozen dataclass whose fields are made by :func:`option`.

    Field types may be ``bool``, ``int``, ``float``, ``str``, an ``enum.Enum`` whose values are
    strings, ``tuple[str, ...]`` (comma-separated on the command line), or one of these ``| None``.
    """

    @classmethod
    def parse(cls, values: Mapping[str, object], *, owner: str) -> Self:
        """Build options from command-line strings or recipe values.

        Args:
            values: Option name to a string (``--set``) or to a TOML value (``--recipe``).
            owner: Name of the pass, for messages.

        Raises:
            UsageError: If a name is unknown or a value does not fit its type or bounds.
        """
        hints = typing.get_type_hints(cls)
        fields = {f.name: f for f in dataclasses.fields(cls)}
        parsed: dict[str, object] = {}
        for name, value in values.items():
            if name not in fields:
                known = ", ".join(fields) or "none"
                raise UsageError(
                    f"pass '{owner}' has no option '{name}'", hint=f"Its options are: {known}."
                )
            parsed[name] = _convert(value, hints[name], f"{owner}.{name}")
        made = cls(**parsed)
        made.validate(owner)
        return made

    def validate(self, owner: str) -> None:
        """Check the bounds declared with :func:`option`; passes extend it for rules across options.

        Raises:
            UsageError: If a value is out of its bounds.
        """
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            low, high = f.metadata.get("minimum"), f.metadata.get("maximum")
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            if not math.isfinite(value):
                raise UsageError(f"option {owner}.{f.name}={value} must be a finite number")
            if (low is not None and value < low) or (high is not None and value > high):
                said = (("at least", low), ("at most", high))
                bounds = " and ".join(
                    f"{word} {bound}" for word, bound in said if bound is not None
                )
                raise UsageError(f"option {owner}.{f.name}={value} must be {bounds}")

    def to_dict(self) -> dict[str, object]:
        """The options as plain TOML values, those that are None left out."""
        return {
            f.name: _plain(value)
            for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) is not None
        }


def _plain(value: object) -> object:
    if isinstance(value, enum.Enum):
        return value.value
    return list(value) if isinstance(value, tuple) else value


def _convert(value: object, hint: object, label: str) -> object:
    """Turn a command-line string or a TOML value into the type ``hint``."""
    if isinstance(hint, types.UnionType):
        members = [m for m in typing.get_args(hint) if m is not type(None)]
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        if value == "":
            raise UsageError(f"option {label} has no value", hint="Leave it out, or write 'none'.")
        hint = members[0]
    if typing.get_origin(hint) is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or not all(isinstance(p, str) for p in parts):
            raise UsageError(f"option {label} wants comma-separated names, not {value!r}")
        return tuple(p.strip() for p in parts if p.strip())
    try:
        return _scalar(value, hint)
    except ValueError:
        wanted = getattr(hint, "__name__", str(hint))
        if isinstance(hint, type) and issubclass(hint, enum.Enum):
            wanted = " or ".join(str(m.value) for m in hint)
        raise UsageError(f"option {label} wants {wanted}, not {value!r}") from None


def _scalar(value: object, hint: object) -> object:
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value.lower() if isinstance(value, str) else value)
    if hint is bool:
        if isinstance(value, bool):
            return value
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        raise ValueError
    if isinstance(value, bool):
        raise ValueError
    if hint is int and isinstance(value, int | str):
        return int(value)
    if hint is float and isinstance(value, int | float | str):
        return float(value)
    if hint is str and isinstance(value, str):
        return value
    raise ValueError


class Pass(Protocol):
    """A transformation of a model.

    ``run`` changes ``model`` in place and says what it did. It may assume a normalized model (see
    :func:`onnxcompress.model_io.normalize`): functions inlined, constants as initializers, unique
    node names, shapes inferred where they can be. It must leave the names, element types and shapes
    of the graph inputs and outputs as they are. New names are ``<original>/<pass>_<role>``.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    stage: ClassVar[Stage]
    needs: ClassVar[frozenset[Statistic]]
    options_type: ClassVar[type[PassOptions]]

    @property
    def options(self) -> PassOptions:
        """The options this pass was made with."""

    def plan(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Say what ``run`` would touch, without calibration data and without changing the model."""

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Transform ``model`` in place."""


@runtime_checkable
class NeedsByTarget(Protocol):
    """A pass whose need of calibration depends on the target."""

    def needs_for(self, target: Target) -> frozenset[Statistic]:
        """What calibration must collect when compressing for ``target``."""


@runtime_checkable
class Completed(Protocol):
    """A pass that another one completes, behind all that still change weights."""

    @property
    def completed_by(self) -> str | None:
        """Name of that pass; None where these options need none."""
