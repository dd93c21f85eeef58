"""A Dask cluster through joblib: jobs travel by value, and every wait has an end."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

import torch

from .._version import __version__
from ..errors import HostError, LrcompressError, MissingExtraError
from .pools import Answer, Guarded, Numbered, compute, quiet

#: How long a scheduler may take to answer, and how long there may be no worker, before the work ends.
ANSWER_SECONDS, WORKERLESS_SECONDS = 10.0, 30.0
#: How often a silent scheduler is asked whether it is there.
_ASK_SECONDS = 2.0


@contextlib.contextmanager
def on_cluster(address: str) -> Iterator[Cluster]:
    """Connect to the scheduler at `address`; `HostError` if none answers there, or its workers are not like us."""
    try:
        import distributed
    except ModuleNotFoundError as e:
        raise MissingExtraError("lrcompress factorize --cluster", e.name or "distributed", "cluster") from e
    where = f"--cluster {address}"
    log = logging.getLogger("distributed")
    level = log.level
    log.setLevel(logging.CRITICAL)  # what matters comes as one line of ours
    client = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about versions that differ: `_check_workers` has a say in that
            try:
                client = distributed.Client(address, timeout=ANSWER_SECONDS, set_as_default=False)
            except Exception as e:  # each transport has errors of its own
                remedy = "start one with 'dask scheduler', and give the address it prints"
                raise HostError(where, "a Dask scheduler that answers", _short(e), remedy) from e
        _check_workers(client, where)
        yield Cluster(client, where)
    finally:
        if client is not None:
            with contextlib.suppress(Exception):  # it is gone, or goes now
                client.close(timeout=2)
        log.setLevel(level)


class Cluster:
    """The workers of a Dask scheduler."""

    def __init__(self, client: Any, where: str) -> None:
        self._client, self._where = client, where

    def unordered(self, jobs: Iterable[Numbered], threads: int) -> Iterator[Answer]:
        """Yield (number, result) as the jobs are done. Raises `HostError` when the cluster is gone."""
        from joblib import Parallel, delayed

        guarded, backend = Guarded(jobs), _backend(self._client)
        slots = max(1, sum(self._client.ncores().values()))
        parallel = Parallel(
            n_jobs=-1, backend=backend, batch_size=1, pre_dispatch=slots + 1, return_as="generator_unordered"
        )
        stop = threading.Event()
        watch = threading.Thread(
            target=_watch, args=(self._client, self._where, backend.fail, stop), name="watch-cluster", daemon=True
        )
        answers = parallel(delayed(_numbered)(n, job.by_value(), threads) for n, job in guarded)
        watch.start()
        try:
            for answer in answers:
                if not (isinstance(answer, tuple) and len(answer) == 2):
                    raise HostError(self._where, "results", f"a {type(answer).__name__}: {_short(answer)}")
                yield answer
        except LrcompressError:
            raise
        except Exception as e:
            raise self._as_ours(e) from e
        finally:
            stop.set()
            with quiet():
                answers.close()
        guarded.check()

    def _as_ours(self, e: Exception) -> Exception:
        """Return the error of the cluster as one line; any other is what the job raised."""
        if not type(e).__module__.startswith(("distributed", "concurrent", "asyncio", "tornado")):
            return e
        return HostError(
            self._where, "a cluster that keeps its workers", _short(e), "mend it, and give the same command again: it continues"
        )  # fmt: skip


def _backend(client: Any) -> Any:
    """Return joblib's backend for Dask, which also hears of tasks that end without a result."""
    from joblib._dask import DaskDistributedBackend

    class Backend(DaskDistributedBackend):  # type: ignore[misc]
        """Joblib's own waits for ever for a task whose worker was lost too often, or whose scheduler is gone."""

        def __init__(self) -> None:
            super().__init__(client=client, wait_for_workers_timeout=WORKERLESS_SECONDS)
            self._pending: dict[Future[Any], Callable[[Any], None]] = {}

        def submit(self, func: Any, callback: Any = None) -> Any:
            job = super().submit(func, callback)
            self._pending[job] = callback
            job.add_done_callback(self._done)
            return job

        def _done(self, job: Future[Any]) -> None:
            callback = self._pending.pop(job, None)
            error = job.exception()
            if error is not None and callback is not None:
                callback(_Failed(error))

        def fail(self, error: Exception) -> None:
            """End all that is waited for."""
            for callback in list(self._pending.values()):
                callback(_Failed(error))

        def retrieve_result_callback(self, out: Any) -> Any:
            if isinstance(out, _Failed):
                raise out.error
            return super().retrieve_result_callback(out)

    return Backend()


class _Failed:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def _numbered(number: int, job: Any, threads: int) -> Answer:
    return number, compute(job, threads)


def _about_worker() -> tuple[str, str]:
    return __version__, torch.__version__


def _check_workers(client: Any, where: str) -> None:
    """Raise `HostError` unless there are workers, all with our versions: others would give other bytes."""
    try:
        client.wait_for_workers(1, timeout=ANSWER_SECONDS)
        addresses = sorted(client.scheduler_info(n_workers=-1)["workers"])
        asked = [client.submit(_about_worker, workers=[a], pure=False) for a in addresses]
        found = [f.result(timeout=60) for f in asked]
    except Exception as e:  # a worker without our package raises what its unpickling does
        remedy = f"start workers with 'dask worker', with lrcompress {__version__} installed"
        raise HostError(where, "workers that can import lrcompress", _short(e), remedy) from e
    mine = _about_worker()
    other = next((f"lrcompress {a} with torch {b}" for a, b in found if (a, b) != mine), None)
    if other is not None:
        raise HostError(
            where, f"workers with lrcompress {mine[0]} and torch {mine[1]}", other, "install the same there"
        )


def _watch(client: Any, where: str, fail: Callable[[Exception], None], stop: threading.Event) -> None:
    """Call `fail` when the scheduler has not answered, or had no worker, for too long."""
    answered = worked = time.monotonic()
    while not stop.wait(_ASK_SECONDS):
        now = time.monotonic()
        try:
            info = client.sync(client.scheduler.identity, n_workers=-1, callback_timeout=ANSWER_SECONDS / 2)
            answered = time.monotonic()
            worked = answered if info["workers"] else worked
            got = ""
        except Exception as e:  # it is gone, or hangs: what it raises is up to the transport
            got = _short(e)
        remedy = "start it again, and give the same command again: it continues"
        if got and now - answered > ANSWER_SECONDS:
            fail(HostError(where, "a Dask scheduler that answers", got, remedy))
            return
        if not got and answered - worked > WORKERLESS_SECONDS:
            fail(HostError(where, "at least one worker", "none left", remedy))
            return


def _short(e: object) -> str:
    text = " ".join(str(e).split())
    return f"{type(e).__name__}: {text[:160]}" if isinstance(e, BaseException) else text[:160]
