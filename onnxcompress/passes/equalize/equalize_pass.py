"""The equalize pass: options, report, and the guarantee that the function stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxcompress.calibration.statistics import Statistic
from onnxcompress.context import PassContext
from onnxcompress.graph.naming import Namer
from onnxcompress.passes.base import Change, PassOptions, PassReport, Stage, option
from onnxcompress.passes.equalize.absorption import absorb, pairs_of
from onnxcompress.passes.equalize.balance import equalize, regions_of
from onnxcompress.targets import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class EqualizeOptions(PassOptions):
    """Options of :class:`EqualizePass`."""

    rounds: int = option(20, "most turns through the layers", minimum=1, maximum=1000)
    absorb: bool = option(
        False, "also move biases that hold in all calibration samples into the next layer"
    )


class EqualizePass:
    """Make channels of weights alike across layers, which costs integers less precision.

    Args:
        options: How; the defaults when None.
    """

    name: ClassVar[str] = "equalize"
    summary: ClassVar[str] = "balance the ranges of weights across layers; outputs stay the same"
    stage: ClassVar[Stage] = Stage.STRUCTURE
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    options_type: ClassVar[type[PassOptions]] = EqualizeOptions

    def __init__(self, options: EqualizeOptions | None = None) -> None:
        self._options = EqualizeOptions() if options is None else options
        self._options.validate(self.name)

    def needs_for(self, target: Target) -> frozenset[Statistic]:
        """Ranges and means where biases are absorbed, else nothing."""
        wanted = {Statistic.RANGE, Statistic.MEAN} if self._options.absorb else set[Statistic]()
        return frozenset(wanted)

    @property
    def options(self) -> EqualizeOptions:
        """The options this pass was made with."""
        return self._options

    def plan(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Say which layers would be balanced."""
        regions, skips = regions_of(model)
        return PassReport(
            changes=tuple(
                Change(
                    node.name or "", node.op_type, f"would be balanced over {region.units} channels"
                )
                for node, region in regions
            ),
            skips=tuple(skips),
            figures={"regions": len(regions)},
        )

    def run(self, model: ir.Model, ctx: PassContext) -> PassReport:
        """Equalize ``model`` in place."""
        balanced, skips, taken = equalize(model, self._options.rounds)
        changes = [
            Change(
                b.node,
                b.op_type,
                f"balanced with {b.layers - 1} other layers: {b.channels} factors, the largest "
                f"{b.spread:.3g} times the least",
            )
            for b in balanced
        ]
        figures = {"regions": len(balanced), "rounds": taken}
        if self._options.absorb:
            pairs, refused = pairs_of(model)
            skips += refused
            absorbed = absorb(model, ctx, pairs, Namer(model))
            figures["layers_absorbed"] = len(absorbed)
            changes += [
                Change(
                    a.node,
                    a.op_type,
                    f"biases of {a.channels} channels moved behind its Relu, whose range ends at "
                    f"{a.after:.4g} instead of {a.before:.4g}",
                )
                for a in absorbed
            ]
        return PassReport(changes=tuple(changes), skips=tuple(skips), figures=figures)
