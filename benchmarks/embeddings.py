"""How far the sentence embeddings of a compressed model are from those of the original.

    python benchmarks/embeddings.py ORIGINAL.onnx RESULT.onnx SAMPLES.npz [--limit N] [--threads N]

For models that take token numbers and a mask of ones and give one vector per token. A sentence's
embedding is the mean of the vectors of its tokens. Prints the mean and the least cosine between the
two models' embeddings.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

Array = npt.NDArray[np.float64]
_BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("original", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("samples", type=Path)
    parser.add_argument("--mask", default="attention_mask", help="name of the mask input")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    with np.load(given.samples) as data:
        arrays = {name: data[name][: given.limit] for name in data.files}
    a, b = (
        embeddings(p, arrays, given.mask, given.threads) for p in (given.original, given.result)
    )
    cosine = np.sum(a * b, axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    print(f"{len(cosine)} sentences: mean cosine {cosine.mean():.4f}, least {cosine.min():.4f}")


def embeddings(
    path: Path, arrays: dict[str, npt.NDArray[np.int64]], mask: str, threads: int
) -> Array:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(path), options)
    found = []
    for start in range(0, len(arrays[mask]), _BATCH):
        feeds = {name: array[start : start + _BATCH] for name, array in arrays.items()}
        tokens = session.run(None, feeds)[0].astype(np.float64)
        used = feeds[mask][:, :, np.newaxis]
        found.append((tokens * used).sum(axis=1) / used.sum(axis=1))
    return np.concatenate(found)


if __name__ == "__main__":
    main()
