"""What to tell users whose model lost cells of a state that is part of its interface."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from onnxcompress.graph.coupling import Coupling, Group


def state_notes(
    coupling: Coupling, removed: Mapping[int, npt.NDArray[np.int64]]
) -> tuple[str, ...]:
    """One sentence about the states that lost cells; nothing if none did.

    Args:
        coupling: The groups of the model.
        removed: Group index to removed units.
    """
    kept = coupling.kept(removed)
    touched = {
        port.state
        for port in coupling.ports
        if port.writes
        and any(
            units is not None and not kept[units[units >= 0]].all()
            for units in coupling.axes[port.value]
        )
    }
    if not touched:
        return ()
    names = ", ".join(f"'{name}'" for name in sorted(touched))
    return (
        f"Removed cells are zero in the state {names}, which keeps its shape; "
        "prune.states=false leaves states alone.",
    )


def through_ports(coupling: Coupling, group: Group) -> bool:
    """Whether units of a group are cells of a state of the interface."""
    kept = coupling.kept({group.index: np.arange(group.size)})
    return any(
        units is not None and not kept[units[units >= 0]].all()
        for port in coupling.ports
        for units in coupling.axes[port.value]
    )
