"""A device's model in an application's own process: it follows what an agent commits, and changes nothing itself.

with EdgeSession("/var/lib/lrcompress") as session:
    y = session.run({"x": x})["output"]       # thread-safe; a commit shows within 100 ms, between two requests

A request sees one payload or the other: the next one is read, verified and copied beside the one that serves, and taking
it is one reference assignment. No request waits for that, and none fails of it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import HostError, LrcompressError
from .device import Device
from .disk import Disk
from .state import COPIES
from .updater import describe_serving

#: How often a watcher looks at two file names; it costs microseconds.
POLL_S = 0.02
#: How long what could not be taken is left alone.
RETRY_S = 0.5


class _Reader(Disk):
    """A disk for those who only look: an application need not be allowed to write."""

    def _put(self, path: Path, data: bytes, flags: int, mode: int) -> None:
        raise HostError(path, "a device folder that is only read here", "a write", "use Device to change it")

    def rename(self, source: Path, dest: Path) -> None:
        self._put(dest, b"", 0, 0)

    def unlink(self, path: Path) -> None:
        self._put(path, b"", 0, 0)


class EdgeSession:
    """The model of a device folder, loaded, and kept at what the folder says."""

    def __init__(self, folder: str | Path | None = None, *, poll_s: float = POLL_S) -> None:
        self._device = Device(folder, disk=_Reader())
        self._copies = [str(self._device.folder / name) for name in COPIES]  # no Path is made at every look
        try:
            self._device._loaded()
        except LrcompressError:  # the agent has moved on to another base meanwhile
            self._device.refresh()
            self._device._loaded()
        self._poll_s, self._stop = poll_s, threading.Event()
        self._seen = self._signature()
        self._ended: datetime | None = None
        self._device.refresh()  # whatever was committed while the model loaded
        self._watcher = threading.Thread(target=self._watch, name="lrcompress-session", daemon=True)
        self._watcher.start()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs for `inputs`. Raises `DataError` for inputs that the model does not take."""
        return self._device.infer(inputs)

    @property
    def serving(self) -> dict[str, Any]:
        """What the next request will see: kind, sha256, seq."""
        return describe_serving(self._device.serving)

    def close(self) -> None:
        """Stop following; requests are still answered."""
        self._stop.set()
        self._watcher.join()

    def __enter__(self) -> EdgeSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _watch(self) -> None:
        pause = self._poll_s
        while not self._stop.wait(pause):
            pause, now = self._poll_s, self._signature()
            over = self._device.serves_until
            ended = over is not None and over != self._ended and datetime.now(UTC) > over
            if now == self._seen and not ended:
                continue
            try:
                self._device.refresh()
            except (
                Exception
            ):  # memory, a disk, the runtime: what serves was verified and goes on; this thread must, too
                pause = RETRY_S
                continue
            self._seen = now
            if ended:  # told once: the state says so until the agent has been there
                self._ended = over

    def _signature(self) -> tuple[object, ...]:
        found: list[object] = []
        for path in self._copies:
            with contextlib.suppress(OSError):
                s = os.lstat(path)
                found.append((path, s.st_ino, s.st_mtime_ns, s.st_size))
        return tuple(found)
