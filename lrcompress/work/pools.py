"""Where jobs are computed: in this process, in processes of this machine, or on a Dask cluster.

    with pool(workers=4) as where:
        for i, packed in where.unordered(enumerated_jobs, threads=1):
            ...

Results come as they are done. A worker that dies is replaced by its cluster, or ends the work with one line here; a
scheduler that no longer answers ends it too. Nothing is waited for without end.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from ..errors import CommandError, HostError
from .jobs import Packed

#: A numbered job and its result.
Numbered = tuple[int, Any]
Answer = tuple[int, Packed]


class Pool(Protocol):
    """A place where jobs are computed."""

    def unordered(self, jobs: Iterable[Numbered], threads: int) -> Iterator[Answer]:
        """Yield (number, result) as the jobs are done, each computed with so many threads."""
        ...


@contextlib.contextmanager
def pool(workers: int | None = None, cluster: str | None = None) -> Iterator[Pool]:
    """Open the pool that is asked for; this process without either.

    Raises `CommandError` for both, or fewer than one worker; `HostError` for a cluster that does not answer.
    """
    if workers is not None and workers < 1:
        raise CommandError("--workers", "a whole number of at least 1", workers, "for example --workers 2")
    if workers is not None and cluster is not None:
        raise CommandError("--cluster", "one of --workers and --cluster", "both", "a cluster brings its own workers")
    if cluster is not None:
        if re.fullmatch(r"(?:[a-z]+://)?[^\s/]+:\d{1,5}/?", cluster) is None:
            raise CommandError(
                "--cluster", "the address of a Dask scheduler", cluster, "for example tcp://10.0.0.1:8786"
            )
        from .cluster import on_cluster

        with on_cluster(cluster) as found:
            yield found
    elif workers is None or workers == 1:
        yield Here()
    else:
        local = Processes(workers)
        try:
            yield local
        finally:
            local.close()


class Here:
    """This process, one job after the other."""

    def unordered(self, jobs: Iterable[Numbered], threads: int) -> Iterator[Answer]:
        for number, job in jobs:
            yield number, compute(job, threads)


class Processes:
    """Processes of this machine, by joblib and loky."""

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def unordered(self, jobs: Iterable[Numbered], threads: int) -> Iterator[Answer]:
        from joblib import Parallel, delayed, parallel_config
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        guarded = Guarded(jobs)
        leave: dict[str, Any] = {"initializer": _leave_with, "initargs": (os.getpid(),)}
        with parallel_config(backend="loky", inner_max_num_threads=threads, **leave):
            parallel = Parallel(
                n_jobs=self._workers, batch_size=1, pre_dispatch=self._workers + 1, max_nbytes=None,
                return_as="generator_unordered",
            )  # fmt: skip
            calls = (delayed(_numbered)(n, job.for_process(), threads) for n, job in guarded)
            answers = parallel(calls)
        try:
            for answer in answers:
                guarded.received += 1
                yield answer
        except TerminatedWorkerError as e:
            raise HostError(
                f"--workers {self._workers}", "workers that live", "one that was killed (out of memory?)",
                "use fewer workers, and give the same command again: it continues",
            ) from e  # fmt: skip
        finally:
            with quiet():
                answers.close()
        guarded.check()

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)


class Guarded:
    """Jobs as another thread takes them: what goes wrong ends them, and is raised by `check` where it is heard."""

    def __init__(self, jobs: Iterable[Numbered]) -> None:
        self._jobs = jobs
        self._error: Exception | None = None
        self._given = 0
        self.received = 0

    def __iter__(self) -> Iterator[Numbered]:
        try:
            for job in self._jobs:
                self._given += 1
                yield job
        except Exception as e:  # joblib loses what its own threads raise, and waits for ever
            self._error = e

    def check(self) -> None:
        """Raise what ended the jobs, or the results, early."""
        if self._error is not None:
            raise self._error
        if self.received != self._given:  # joblib may stop without a word when a worker is lost
            got = f"{self.received} of {self._given}"
            raise HostError("the workers", "a result of every job", got, "give the same command again: it continues")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep joblib from warning of results that nobody wants any more."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def compute(job: Any, threads: int) -> Packed:
    """Compute a job with so many threads, in torch and in the BLAS of NumPy."""
    from threadpoolctl import threadpool_limits

    try:
        with threadpool_limits(threads, user_api="blas"):
            found: Packed = job.compute(threads)
            return found
    finally:
        _trim()


def _trim() -> None:
    """Give freed memory back: glibc keeps holes of many megabytes, more with every layer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _numbered(number: int, job: Any, threads: int) -> Answer:
    return number, compute(job, threads)


def _leave_with(parent: int) -> None:
    """End this worker when the process that it works for is gone: a killed one cannot say so."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="leave-with-parent", daemon=True).start()
