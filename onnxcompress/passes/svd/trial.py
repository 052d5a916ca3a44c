"""What a chain in the place of one layer does to the outputs of the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcompress import model_io
from onnxcompress.context import PassContext
from onnxcompress.numerics.low_rank import Chain
from onnxcompress.passes.prune.probe import OutputProbe
from onnxcompress.passes.prune.suffix import SuffixProbe
from onnxcompress.passes.svd.emit import Writer
from onnxcompress.passes.svd.sites import Site

Array = npt.NDArray[np.float64]


class Trial:
    """Measures the layers of a model one after the other.

    Only what lies behind the layer is run, where that is possible.

    Args:
        model: The model.
        whole: The measurement on the whole model.
        ctx: How to run.
        sites: The layers, in the order in which they will be asked for.
    """

    def __init__(
        self, model: ir.Model, whole: OutputProbe, ctx: PassContext, sites: Sequence[Site]
    ) -> None:
        self._model, self._whole = model, whole
        self._numbers = {site: i for i, site in enumerate(sites)}
        layers = {i: ((site.node,), ()) for site, i in self._numbers.items()}
        self._probe = SuffixProbe(model, whole, ctx, layers, "svd: running to the next layer")

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        self._probe.__exit__()

    def error_of(self, site: Site, chains: Sequence[Chain], bias: Array | None) -> float:
        """The error of the outputs with the layer replaced."""
        number = self._numbers[site]
        part = self._probe.part(number)
        variant = model_io.clone(self._model) if part is None else part
        Writer(variant).write(site, chains, bias)
        if part is None:
            return self._whole.error_of(variant)
        return self._probe.error_of(number, part)
