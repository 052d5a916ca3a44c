"""Structured pruning: remove whole channels, heads and hidden units, and repair what is left."""

from onnxcompress.passes.prune.options import Importance, PruneOptions
from onnxcompress.passes.prune.prune import PrunePass

__all__ = ["Importance", "PruneOptions", "PrunePass"]
