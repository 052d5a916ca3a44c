"""Measure many versions of a model, in this process or in several.

Everything goes through one function, so the results do not depend on where they are computed:
tasks are independent, each runs with one thread, and results come back in the order of the tasks.
Sessions and graphs do not pickle; a task is a function of a module and an argument of plain values
(a path, names), and workers build what they need and keep it.
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

from onnxcompress._threads import usable_cores
from onnxcompress.errors import UsageError
from onnxcompress.progress import Progress

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")

_WORTH_SECONDS = 4.0
"""Starting processes takes 2 to 3 s: less work than this is done here."""

_TRIED = 3
"""Tasks done here first, to see how long they take."""


class Backend(enum.Enum):
    """Where tasks run."""

    LOKY = "loky"
    DASK = "dask"
    RAY = "ray"


@dataclass(frozen=True, slots=True)
class Workers:
    """How many processes, and where.

    Attributes:
        jobs: Number of processes; 1 stays in this one, None takes all cores where the work is
            worth it.
        backend: loky starts processes on this machine; dask and ray use a cluster.
    """

    jobs: int | None = None
    backend: Backend = Backend.LOKY

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"jobs must be at least 1, not {self.jobs}")


class _Joblib(Protocol):
    def Parallel(  # noqa: N802 - joblib's name
        self, *, return_as: str
    ) -> Callable[[Iterator[object]], Iterator[object]]: ...

    def delayed(self, function: Callable[[_Task], _Result]) -> Callable[[_Task], object]: ...

    def parallel_config(self, *, backend: str, n_jobs: int) -> AbstractContextManager[object]: ...


def run_tasks(
    function: Callable[[_Task], _Result],
    tasks: Sequence[_Task],
    workers: Workers,
    *,
    share: Callable[[], None],
    progress: Progress,
    description: str,
) -> list[_Result]:
    """``[function(task) for task in tasks]``, in several processes where that is asked for.

    Args:
        function: A function of a module.
        tasks: Its arguments; they must pickle.
        workers: How many processes, and where.
        share: Called once before other processes start: writes what they will read.
        progress: Where to report progress.
        description: What is done, for the progress.

    Raises:
        UsageError: If the backend is not installed.
    """
    results: list[_Result] = []
    with progress.task(description, len(tasks)) as task:
        started = time.monotonic()
        for number, each in enumerate(tasks):
            if _leaves(workers, number, len(tasks), time.monotonic() - started):
                break
            results.append(function(each))
            task.advance()
        rest = tasks[len(results) :]
        if rest:
            share()
            for result in _elsewhere(function, rest, workers):
                results.append(result)
                task.advance()
    return results


def _leaves(workers: Workers, done: int, count: int, seconds: float) -> bool:
    """Whether the tasks that are left go to other processes."""
    if workers.backend is not Backend.LOKY or (workers.jobs or 1) > 1:
        return True
    if workers.jobs == 1 or usable_cores() == 1 or done != _TRIED:
        return False
    return seconds / done * (count - done) > _WORTH_SECONDS and _has_joblib()


def _has_joblib() -> bool:
    return importlib.util.find_spec("joblib") is not None


def _elsewhere(
    function: Callable[[_Task], _Result], tasks: Sequence[_Task], workers: Workers
) -> Iterator[_Result]:
    joblib = cast("_Joblib", _module("joblib", workers.backend))
    with (
        _cluster(workers),
        joblib.parallel_config(backend=workers.backend.value, n_jobs=_processes(workers)),
    ):
        call = joblib.delayed(function)
        run = joblib.Parallel(return_as="list" if workers.backend is Backend.RAY else "generator")
        yield from cast("Iterator[_Result]", run(call(task) for task in tasks))


def _processes(workers: Workers) -> int:
    """Processes to ask joblib for: -1 takes all of the machine's, or all of the cluster's."""
    if workers.jobs is not None:
        return workers.jobs
    return usable_cores() if workers.backend is Backend.LOKY else -1


@contextmanager
def _cluster(workers: Workers) -> Iterator[None]:
    """A connection to the cluster, for as long as it is used.

    dask connects to the scheduler that ``DASK_SCHEDULER_ADDRESS`` names, ray to what
    ``RAY_ADDRESS`` names; without it each starts a cluster on this machine.
    """
    if workers.backend is Backend.DASK:
        distributed = _module("distributed", workers.backend)
        with distributed.Client(set_as_default=True):  # type: ignore[attr-defined]
            yield
    elif workers.backend is Backend.RAY:
        _module("ray", workers.backend)
        _module("ray.util.joblib", workers.backend).register_ray()  # type: ignore[attr-defined]
        yield
    else:
        yield


def _module(name: str, backend: Backend) -> object:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = "ray" if backend is Backend.RAY and name != "joblib" else "onnxcompress[cluster]"
        raise UsageError(
            f"--backend {backend.value} needs the package {name.split('.')[0]}: {error}",
            hint=f"pip install '{package}', or use --jobs 1.",
        ) from error
