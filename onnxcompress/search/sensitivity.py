"""How much each node costs the outputs: the table, and how much work it may take.

Two questions are asked of every node: how far are the outputs from the original's when *only* this
node is in low precision, and how far when it is the only one that is *not*. The first shows a node
that does harm by itself, the second one that is worth lifting with all others as they are. Where
noise adds up, the noise of the first is the gain of the second.

The bounds are numbers of nodes, samples and multiply-accumulates, never seconds, so the same
request gives the same table on every machine and with any number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnxcompress.passes.base import Table

_MACS = 6e11
"""Most multiply-accumulates of a whole table: about half a minute on one core."""

_SAMPLES = 32
_LEAST_SAMPLES = 4


@dataclass(frozen=True, slots=True)
class NodeSensitivity:
    """One row.

    Attributes:
        node: Its name.
        op_type: Its operator.
        only_db: SQNR in dB of the worst output with only this node in low precision.
        without_db: The same with all in low precision but this node.
        only_noise: Noise-to-signal ratio with only this node in low precision.
        without_noise: The same with all but this node.
        macs: Multiply-accumulates of the node.
        precision: What it ended in.
    """

    node: str
    op_type: str
    only_db: float
    without_db: float
    only_noise: float
    without_noise: float
    macs: int
    precision: str

    def gain(self, all_noise: float) -> float:
        """Noise that lifting the node takes away: the mean of both answers.

        Args:
            all_noise: Noise-to-signal ratio with all nodes in low precision.
        """
        with_others = max(all_noise - self.without_noise, 0.0)
        return 0.5 * (self.only_noise + with_others)


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much is measured.

    Attributes:
        nodes: Nodes, the likeliest ones first.
        samples: Samples per version.
    """

    nodes: int
    samples: int


def bounds_for(nodes: int, macs: int, *, most_nodes: int) -> Bounds:
    """Bound a table of ``nodes`` nodes of a model of ``macs`` multiply-accumulates per sample.

    Up to 32 samples, fewer where the work would be more than 6e11 multiply-accumulates; with 4
    samples fewer nodes.
    """
    nodes = min(nodes, most_nodes)
    samples = int(_MACS / (2 * max(nodes, 1) * max(macs, 1)))
    if samples < _LEAST_SAMPLES:
        nodes = max(1, min(nodes, int(_MACS / (2 * _LEAST_SAMPLES * max(macs, 1)))))
    return Bounds(nodes, max(_LEAST_SAMPLES, min(samples, _SAMPLES)))


def table_of(rows: Sequence[NodeSensitivity], all_db: float, samples: int) -> Table:
    """The table for reports, the node most worth lifting first.

    Args:
        rows: What was measured.
        all_db: SQNR in dB of the worst output with all nodes in low precision.
        samples: Samples measured on.
    """
    ordered = sorted(rows, key=lambda row: (-row.without_db, row.only_db, row.node))
    return Table(
        title=f"sensitivity: SQNR of the worst output in dB on {samples} samples; "
        f"{all_db:.1f} dB with all of them on integers",
        columns=("node", "operator", "only it", "all but it", "MACs", "ends in"),
        rows=tuple(
            (
                row.node,
                row.op_type,
                round(row.only_db, 1),
                round(row.without_db, 1),
                row.macs,
                row.precision,
            )
            for row in ordered
        ),
    )
