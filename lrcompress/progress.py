"""How long work reports itself: a protocol that is passed in, never a global.

with progress.task("factorize", total=len(layers)) as advance:
    for layer in layers:
        ...
        advance(1, layer.name)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

Advance = Callable[..., None]


class Progress(Protocol):
    """Something that shows tasks; `advance(n, text)` moves the current one."""

    def task(self, name: str, total: float | None = None) -> contextlib.AbstractContextManager[Advance]: ...


class Silent:
    """A `Progress` that shows nothing."""

    @contextlib.contextmanager
    def task(self, name: str, total: float | None = None) -> Iterator[Advance]:
        yield lambda n=1, text="": None
