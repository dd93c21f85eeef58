"""What was computed last for one weight in one metric: forms that differ in their gauge ask for it in turn.

_KEPT = Memo(_fits)             # of _fits(weight, metric)
fits = _KEPT(weight, statistics)
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ._types import Statistics

T = TypeVar("T")
Key = tuple[tuple[int, ...], torch.dtype, bytes]


class _Last(Generic[T]):
    """The last answer that one thread was given; it goes with its thread."""

    def __init__(self) -> None:
        self.entry: tuple[weakref.ref[Statistics], Key, T] | None = None


class Memo(Generic[T]):
    """A function of (weight, statistics) that remembers its last answer in every thread, for as long as those statistics are in use.

    Weights are compared by value; statistics, which are frozen, by identity. It keeps neither alive.
    """

    def __init__(self, compute: Callable[[Tensor, Statistics], T]) -> None:
        self._compute = compute
        self._local = threading.local()  # each thread has a weight of its own at hand
        self._all: weakref.WeakSet[_Last[T]] = weakref.WeakSet()

    def __call__(self, weight: Tensor, statistics: Statistics | None) -> T:
        if statistics is None:
            return self._compute(weight, Statistics())
        own: _Last[T] | None = getattr(self._local, "own", None)
        if own is None:
            own = self._local.own = _Last()
            self._all.add(own)
        key, last = _key(weight), own.entry  # read once: it may be forgotten meanwhile
        if last is not None and last[0]() is statistics and last[1] == key:
            return last[2]
        found = self._compute(weight, statistics)
        own.entry = weakref.ref(statistics, self._forget), key, found
        return found

    def _forget(self, gone: weakref.ref[Statistics]) -> None:
        for own in list(self._all):
            last = own.entry
            if last is not None and last[0] is gone:
                own.entry = None


def _key(weight: Tensor) -> Key:
    data = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return tuple(weight.shape), weight.dtype, hashlib.blake2b(data.tobytes()).digest()
