"""A program of its own that prints the peak memory of a model, in bytes.

``python -m onnxcompress.verification.measure_memory REQUEST``, where REQUEST is JSON with
``model``, ``inputs`` (a .npz file), ``names`` (of its arrays, in order), ``providers`` and
``threads``. What is printed is the peak of this process after loading and running, less what it
held before: the libraries do not count.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from onnxcompress.runtime import SessionSettings, open_session

_RUNS = 3


def memory_bytes(*, peak: bool) -> int | None:
    """Memory of this process now, or its peak, in bytes; None where the system does not tell.

    Linux tells both in ``/proc``. ``getrusage`` is no use there: its peak survives ``exec`` and so
    contains the parent's. Other Unix systems tell the peak only, which serves for both.
    """
    status = Path("/proc/self/status")
    if status.exists():
        wanted = "VmHWM:" if peak else "VmRSS:"
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith(wanted):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return None
    import resource  # there is none on Windows

    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024


def main(request: str) -> int:
    """Measure what ``request`` names and print it."""
    job = json.loads(request)
    with np.load(job["inputs"], allow_pickle=False) as arrays:
        feeds = {name: arrays[f"arr_{i}"] for i, name in enumerate(job["names"])}
    settings = SessionSettings(providers=tuple(job["providers"]), threads=job["threads"])
    before = memory_bytes(peak=False)
    session = open_session(Path(job["model"]), settings)
    for _ in range(_RUNS):
        session.run(feeds)
    after = memory_bytes(peak=True)
    if before is None or after is None:
        return 1
    print(max(0, after - before))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
