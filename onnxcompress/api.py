"""Comparing two model files from Python: :func:`verify` and :func:`benchmark`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onnxcompress import model_io
from onnxcompress.calibration.sources import Dataset, DataSource, ImageOptions
from onnxcompress.errors import UsageError
from onnxcompress.progress import Progress, SilentProgress
from onnxcompress.recipe import Recipe, check_threads
from onnxcompress.runtime import SessionSettings, resolve_providers
from onnxcompress.selection import Labels, evaluation_data
from onnxcompress.verification.gates import Gates
from onnxcompress.verification.side_by_side import Verification, time_models, verify_models


def verify(
    original: str | Path,
    result: str | Path,
    data: DataSource | Dataset | None = None,
    *,
    labels: Labels | None = None,
    gates: Gates | None = None,
    provider: str = "cpu",
    threads: int | None = None,
    batch_size: int = 8,
    samples: int | None = None,
    seed: int = 0,
    image: ImageOptions | None = None,
    measure: bool = True,
    progress: Progress | None = None,
) -> Verification:
    """Run two models on the same inputs and say how far the second is from the first.

    Args:
        original: The model before.
        result: The model after; any tool may have made it.
        data: Inputs; by default those beside the original (NAME.eval.npz), else invented ones.
        labels: Class numbers of the samples, for top-1 of both.
        gates: Limits that decide ``passed``; a default gate when None.
        provider: "cpu", "cuda" or "auto".
        threads: Threads of onnxruntime; None takes all cores, and one for latency.
        batch_size: Samples per run.
        samples: Most samples to use; None takes all.
        seed: Seed of invented inputs.
        image: How to read folders of images.
        measure: Whether to measure latency and peak memory.
        progress: Where to report progress.

    Raises:
        ModelError: If the original cannot be used. A result that cannot is a failed verification.
        DataError: If the data cannot be used with the original.
        UsageError: If the request contradicts itself.
        ProviderError: If the provider is not there.
    """
    settings = SessionSettings(providers=resolve_providers(provider), threads=threads or 0)
    recipe = Recipe(
        seed=seed, image=image, eval_samples=samples, batch_size=batch_size, threads=threads
    )
    return verify_models(
        Path(original),
        Path(result),
        _data(Path(original), data, labels, recipe),
        gates=gates,
        settings=settings,
        batch_size=batch_size,
        latency_threads=(threads or 1,),
        measure=measure,
        progress=progress,
    )


def benchmark(
    original: str | Path,
    result: str | Path,
    data: DataSource | Dataset | None = None,
    *,
    provider: str = "cpu",
    threads: Sequence[int] = (1,),
    batch_sizes: Sequence[int] = (1, 8),
    seed: int = 0,
    image: ImageOptions | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Time two models in turns on the same inputs, and weigh them; outputs are not compared.

    Args:
        original: The first model.
        result: The second model, with the same inputs and outputs.
        data: Inputs; by default those beside the first model (NAME.eval.npz), else invented ones.
        provider: "cpu", "cuda" or "auto".
        threads: Numbers of threads to measure with; 0 takes all cores.
        batch_sizes: Samples per run; models of a fixed batch have only one.
        seed: Seed of invented inputs.
        image: How to read folders of images.
        progress: Where to report progress.

    Raises:
        ModelError: If one of the models cannot be used, or their inputs or outputs differ.
        DataError: If the data cannot be used.
        UsageError: If the request contradicts itself.
        ProviderError: If the provider is not there.
    """
    for count in threads:
        check_threads(count)
    if not threads or not batch_sizes or min(batch_sizes) < 1:
        raise UsageError("a benchmark needs numbers of threads, and batch sizes of at least 1")
    return time_models(
        Path(original),
        Path(result),
        _data(Path(original), data, None, Recipe(seed=seed, image=image)),
        settings=SessionSettings(providers=resolve_providers(provider)),
        batch_sizes=batch_sizes,
        threads=threads,
        progress=progress or SilentProgress(),
    )


def _data(
    original: Path, data: DataSource | Dataset | None, labels: Labels | None, recipe: Recipe
) -> Dataset:
    if isinstance(data, Dataset):
        return data
    return evaluation_data(model_io.load(original), original, data, labels=labels, recipe=recipe)
