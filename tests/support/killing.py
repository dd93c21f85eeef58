"""A disk that stops working: at the k-th call that changes it, the process is dead, or the disk is full."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Iterator

_CALLS = [(os, n) for n in ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir")] + [(tempfile, "mkstemp")]
#: Those that need room.
_GROWING = {"fsync", "mkdir", "mkstemp"}


class Killed(BaseException):
    """The end of a process. Nothing that runs after it, clean-up included, changes the disk any more."""


@contextlib.contextmanager
def stops(at: int, *, full: bool = False) -> Iterator[list[str]]:
    """Let the `at`-th change of the disk (from 1) and all after it fail; yield the names of the calls that were made.

    `full`: only calls that need room fail, with ENOSPC, and only once; else the process is killed.
    """
    made: list[str] = []

    def wrap(name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            if not full or name in _GROWING:
                made.append(name)
                if full and len(made) == at:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if not full and len(made) >= at:
                    raise Killed
            return real(*args, **options)

        return call

    reals = [(module, name, getattr(module, name)) for module, name in _CALLS]
    try:
        for module, name, real in reals:
            setattr(module, name, wrap(name, real))
        yield made
    finally:
        for module, name, real in reals:
            setattr(module, name, real)
