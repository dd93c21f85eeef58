"""Run jobs in a pool, keep what is done, yield it in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from .jobs import Packed, Task
from .pools import Here, Pool
from .store import Store

R = TypeVar("R")


def run(
    jobs: Sequence[Task[R]], *, store: Store | None = None, pool: Pool | None = None, threads: int
) -> Iterator[tuple[str, R]]:
    """Yield (key, result) of every job in the order given; what `store` holds is not computed again.

    Results are kept as they are done, whichever is first, so that a kill loses only what was being computed.
    """
    keys: dict[int, str] = {}
    ready: dict[int, Packed | None] = {}

    def missing() -> Iterator[tuple[int, Task[R]]]:
        for i, job in enumerate(jobs):
            keys[i] = job.key(threads)
            if store is not None and store.get(keys[i]) is not None:
                ready[i] = None
            else:
                yield i, job

    def result(i: int) -> R:
        packed = ready.pop(i)
        if packed is None:
            assert store is not None
            packed = store.get(keys[i])
        if packed is None:  # damaged since it was looked at
            packed = next(Here().unordered([(i, jobs[i])], threads))[1]
        return jobs[i].unpack(packed)

    following = 0
    for i, packed in (pool or Here()).unordered(missing(), threads):
        if store is not None:
            store.put(keys[i], packed)
        # With a store, what must wait for its turn waits there.
        ready[i] = packed if store is None or i == following else None
        del packed
        while following in ready:
            yield keys[following], result(following)
            following += 1
    while following < len(jobs):
        yield keys[following], result(following)
        following += 1


__all__ = ["run"]
