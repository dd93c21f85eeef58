"""Small linear algebra on many threads: one thread for each piece, not all threads in each piece.

Matrices of a few hundred columns gain nothing from threads inside one product, and lose much where cores are shared.
Pieces are independent and their results come in order, so that nothing depends on how many threads there were.

    with apart() as threads:                              # from here on every operation runs on one thread
        found = threads.each(decompose, layers)           # but several of them at a time
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

#: From so many columns on, threads inside one product pay, and its memory is worth sparing.
WIDE = 1024


@dataclass(frozen=True)
class Threads:
    """Threads that stand ready for pieces of work."""

    count: int = 1

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Return function(item) of all items, in order. Raises what the first item that failed raised."""
        return list(self.stream(function, items))

    def stream(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """Yield function(item) of all items, in order, and hold no more results than there are threads."""
        work = list(items)
        if self.count == 1 or len(work) < 2:
            yield from map(function, work)
            return
        grad = torch.is_grad_enabled()  # is of a thread

        def one(item: T) -> R:
            with torch.set_grad_enabled(grad):
                return function(item)

        pending: deque[Future[R]] = deque()
        with ThreadPoolExecutor(min(self.count, len(work))) as pool:
            try:
                for item in work:
                    if len(pending) == self.count:
                        yield pending.popleft().result()
                    pending.append(pool.submit(one, item))
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def together(self, columns: int) -> contextlib.AbstractContextManager[None]:
        """Compute on all threads inside where matrices have so many columns that it pays."""
        return _set(self.count if columns >= WIDE else torch.get_num_threads())


ONE = Threads()


@contextlib.contextmanager
def apart(columns: int = 0) -> Iterator[Threads]:
    """Compute on one thread inside, for matrices of so many columns: wide ones keep all threads."""
    count = torch.get_num_threads()
    with _set(count if columns >= WIDE else 1):
        yield Threads(count)


@contextlib.contextmanager
def _set(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
