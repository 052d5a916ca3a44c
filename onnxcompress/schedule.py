"""Which passes run and in which order: the user names them, stages decide the order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from onnxcompress.errors import UsageError
from onnxcompress.passes import make_pass, pass_class
from onnxcompress.passes.base import Completed, NeedsByTarget, Stage
from onnxcompress.targets import Target

if TYPE_CHECKING:
    from onnxcompress.calibration.statistics import Statistic
    from onnxcompress.passes.base import Pass
    from onnxcompress.recipe import Recipe

# Passes that prepare a model for every other one, in the order they run.
PREPARATIONS = ("simplify", "fold")


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of a run.

    Attributes:
        name: Name of the pass.
        instance: The pass with its options.
        automatic: Whether the tool added it.
    """

    name: str
    instance: Pass
    automatic: bool


@dataclass(frozen=True, slots=True)
class Schedule:
    """The passes of a run in the order they run, and what to tell the user about it."""

    steps: tuple[Step, ...]
    notes: tuple[str, ...]

    def needs_calibration(self, target: Target) -> bool:
        """Whether any pass asks for statistics when compressing for ``target``."""
        return any(_needs(step.instance, target) for step in self.steps)


def _needs(instance: Pass, target: Target) -> frozenset[Statistic]:
    if isinstance(instance, NeedsByTarget):
        return instance.needs_for(target)
    return instance.needs


def plan_schedule(recipe: Recipe) -> Schedule:
    """Make the passes that a recipe asks for, in the order of their stages.

    Raises:
        UsageError: If no pass is asked for, one is unknown or named twice, or options are given for
            a pass that is not in the run.
    """
    asked = recipe.passes
    if not asked:
        raise UsageError(
            "no passes are asked for",
            hint="Give --passes, such as --passes quant,prune; 'onnxcompress passes' lists them.",
        )
    twice = sorted({name for name in asked if asked.count(name) > 1})
    if twice:
        raise UsageError(f"pass '{twice[0]}' is named twice in --passes {','.join(asked)}")
    added = _preparations(recipe, {name: pass_class(name).stage for name in asked})

    def step(name: str) -> Step:
        return Step(name, make_pass(name, recipe.options.get(name, {})), name not in asked)

    steps = [step(name) for name in (*added, *asked)]
    completions = _completions(steps)
    steps += [step(name) for name in completions]
    _check_owners(recipe.options, tuple(step.name for step in steps))
    steps.sort(key=lambda step: step.instance.stage)
    notes = [*_notes(asked, added, steps), *(f"Added {n}: {why}" for n, why in completions.items())]
    return Schedule(tuple(steps), tuple(notes))


def _completions(steps: list[Step]) -> dict[str, str]:
    """Passes to add because others want to be completed by them, with the reason."""
    found: dict[str, str] = {}
    there = {step.name for step in steps}
    for step in steps:
        last = step.instance.completed_by if isinstance(step.instance, Completed) else None
        if last is not None and last not in there:
            found.setdefault(last, f"it completes {step.name}.")
    return found


def _preparations(recipe: Recipe, stages: Mapping[str, Stage]) -> tuple[str, ...]:
    if all(stage == Stage.PREPARE for stage in stages.values()):
        return ()
    wanted = {"simplify": recipe.simplify, "fold": recipe.fold}
    return tuple(name for name in PREPARATIONS if wanted[name] and name not in stages)


def _check_owners(options: Mapping[str, Mapping[str, object]], run: tuple[str, ...]) -> None:
    for owner, values in options.items():
        if owner in run or not values:
            continue
        first = next(iter(values))
        pass_class(owner)  # an unknown pass has a better message
        raise UsageError(
            f"option {owner}.{first} is set, but pass '{owner}' is not in this run",
            hint=f"The passes are: {', '.join(run)}. Add '{owner}' to them, or drop the option.",
        )


def _notes(asked: tuple[str, ...], added: tuple[str, ...], steps: list[Step]) -> list[str]:
    notes = []
    if added:
        off = " and ".join(f"--no-{name}" for name in added)
        notes.append(
            f"Added {' and '.join(added)} before the passes asked for ({off} to switch off)."
        )
    order = tuple(step.name for step in steps if step.name in asked)
    if order != asked:
        notes.append(
            f"The passes run in the order of their stages, {' → '.join(order)}, not as typed "
            f"({', '.join(asked)})."
        )
    return notes
