"""What happens while a model is quantized, kept for the report."""

from __future__ import annotations

from collections.abc import Iterable

from onnxcompress.passes.base import Skip
from onnxcompress.passes.quant.placement import Network


class Ledger:
    """Skips, figures and notes, as they come.

    Attributes:
        skips: Nodes left in float, with the reason, by name.
        notes: Remarks.
        figures: Figures.
    """

    def __init__(self) -> None:
        self.skips: dict[str, Skip] = {}
        self.notes: list[str] = []
        self.figures: dict[str, float | int | str] = {}

    def reject(self, network: Network, names: Iterable[str], reason: str) -> None:
        """Say why nodes stay in float."""
        for name in names:
            self.skips[name] = Skip(name, network.nodes[name].op_type, reason)
