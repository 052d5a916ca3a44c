"""Windows that slide over the spatial axes of a tensor, and the way back from what they make."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import onnx_ir as ir

from onnxcompress.graph.gradient.tape import Shape, StoppedError, Tape


@dataclass(frozen=True, slots=True)
class Windows:
    """Where the windows of a node lie; one entry for each spatial axis.

    Attributes:
        kernel: Places of a window.
        strides: Steps from a window to the next.
        dilations: Steps from a place to the next.
        before: Padding in front.
        after: Padding behind.
        lengths: Of what the windows slide over.
        made: How many windows there are.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    lengths: Shape
    made: Shape

    @classmethod
    def of(cls, node: ir.Node, kernel: Sequence[int], lengths: Shape, made: Shape) -> Self:
        """The windows of a convolution or pooling, however it says how it is padded."""
        ones = (1,) * len(kernel)
        strides = tuple(node.attributes.get_ints("strides", ones))
        dilations = tuple(node.attributes.get_ints("dilations", ones))
        how = node.attributes.get_string("auto_pad", "NOTSET")
        if how == "NOTSET":
            pads = tuple(node.attributes.get_ints("pads", (0, 0) * len(kernel)))
            before, after = pads[: len(kernel)], pads[len(kernel) :]
        else:
            spans = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
            axes = zip(made, strides, spans, lengths, strict=True)
            total = [0 if how == "VALID" else max((o - 1) * s + n - i, 0) for o, s, n, i in axes]
            less = tuple(n // 2 for n in total)
            more = tuple(n - m for n, m in zip(total, less, strict=True))
            before, after = (more, less) if how == "SAME_LOWER" else (less, more)
        return cls(tuple(kernel), strides, dilations, before, after, lengths, made)

    def seen(self, tape: Tape, x: ir.Value, samples: int, channels: int) -> Iterator[ir.Value]:
        """What the windows of ``x`` hold at each of their places in turn."""
        axes = range(2, 2 + len(self.kernel))
        ends = zip(self.lengths, self.before, self.after, strict=True)
        whole = (samples, channels, *(i + b + a for i, b, a in ends))
        shape = (samples, channels, *self.lengths)
        padded = tape.place(x, shape, (0, 0, *self.before), (1,) * len(shape), whole)
        if all(k == s == 1 for k, s in zip(self.kernel, self.strides, strict=True)):
            yield padded
            return
        for tap in itertools.product(*(range(k) for k in self.kernel)):
            starts = [t * d for t, d in zip(tap, self.dilations, strict=True)]
            last = [
                b + (o - 1) * s + 1 for b, o, s in zip(starts, self.made, self.strides, strict=True)
            ]
            yield tape.cut(padded, starts, last, axes, self.strides)

    def back(self, tape: Tape, value: ir.Value, weight: ir.Value, groups: int) -> ir.Value:
        """What each window holds, times a weight, summed where the windows lie.

        Raises:
            StoppedError: If the last window sticks out, as rounding up lets it.
        """
        reached = [
            (o - 1) * s + d * (k - 1) + 1 - b - a
            for o, s, d, k, b, a in zip(
                self.made,
                self.strides,
                self.dilations,
                self.kernel,
                self.before,
                self.after,
                strict=True,
            )
        ]
        rest = [i - r for i, r in zip(self.lengths, reached, strict=True)]
        if min(rest) < 0:
            raise StoppedError("its last window sticks out")
        return tape.op(
            "ConvTranspose",
            value,
            weight,
            group=groups,
            strides=self.strides,
            dilations=self.dilations,
            pads=[*self.before, *self.after],
            output_padding=rest,
        )
