"""TensorBoard logs, where it is installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ..errors import HostError


class Log(Protocol):
    """Takes numbers by name and step."""

    def add_scalar(self, tag: str, value: float, step: int) -> object: ...


class NoLog:
    """Takes numbers and forgets them."""

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        return None


def available() -> bool:
    """Tell whether TensorBoard can be written."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        return False
    return True


@contextlib.contextmanager
def log_to(folder: Path | None, *, asked: bool) -> Iterator[Log]:
    """Yield a log in `folder`, or one that forgets; `HostError` where it was asked for and TensorBoard is missing."""
    if folder is None or not available():
        if asked:
            raise HostError(
                "lrcompress recover --log",
                "TensorBoard (package 'tensorboard')",
                "none",
                "install it: pip install tensorboard",
            )
        yield NoLog()
        return
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))  # type: ignore[no-untyped-call]
    try:
        yield writer
    finally:
        writer.close()  # type: ignore[no-untyped-call]
