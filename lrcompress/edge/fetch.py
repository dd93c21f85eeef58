"""Bring one file of known length and hash over a bad link: what arrived is kept, and the rest is asked for.

fetch(transport, "targets/…", length=n, part=store.part(sha), disk=disk)
store.verify_download(sha)                        # which makes it durable and checks the hash
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DownloadError, HostError
from .disk import Disk
from .transport import Broken, Transport, Unavailable

#: Tries in a row without a new byte, before giving up until the next call.
MAX_IDLE_TRIES = 4
#: Tries in all: some, and as many as a link needs that is cut every 2 KiB.
MAX_TRIES, BYTES_PER_TRY = 200, 2048
#: What a power cut may cost of a download: more often, and flash wears.
SYNC_BYTES = 1 << 20


def fetch(
    transport: Transport, path: str, *, length: int, part: Path, disk: Disk, sleep: Callable[[float], None] = time.sleep
) -> bool:
    """Grow `part` to `length` bytes; return whether any of them were there before.

    Raises `DownloadError` when tries are used up or the file is gone (what arrived stays), `HostError` for a full disk.
    """
    file = _Part(part, disk)
    if file.size > length:
        file.drop()
    resumed, idle, why = file.size, 0, ""
    for _ in range(MAX_TRIES + length // BYTES_PER_TRY):
        had = file.size
        if had == length:
            return resumed > 0
        if idle:
            sleep(min(30.0, 0.5 * 2**idle))
        try:
            _receive(transport, path, length, file)
            why = "the connection ended early"
        except Unavailable as e:
            if e.status == 416:
                file.drop()
            elif not e.passing:
                raise DownloadError(
                    path, "the file that was signed", f"status {e.status}", "publish it again, or check the URL"
                ) from e
            why = str(e)
        except Broken as e:
            why = str(e)
        except HostError:
            file.drop()  # it would stand in the way of whatever needs the room
            raise
        idle = 0 if file.size > had else idle + 1
        if idle > MAX_IDLE_TRIES:
            break
    if file.size == length:
        return resumed > 0
    file.keep()
    raise DownloadError(path, f"{length} bytes", f"{file.size}: {why}", "it goes on from there with the next update")


@dataclass
class _Part:
    """What has arrived of a file."""

    path: Path
    disk: Disk
    size: int = 0
    synced: int = 0
    named: bool = field(default=False)

    def __post_init__(self) -> None:
        self.size = self.synced = self.disk.size(self.path)
        self.named = self.size > 0

    def add(self, data: bytes) -> None:
        self.disk.append(self.path, data)
        self.size += len(data)
        if self.size - self.synced >= SYNC_BYTES:
            self.keep()

    def keep(self) -> None:
        """Make what arrived last, so that a power cut does not have it sent again."""
        if self.size > self.synced:
            self.disk.sync(self.path)
            self.synced = self.size
        if not self.named and self.size:
            self.disk.sync_folder(self.path.parent)
            self.named = True

    def drop(self) -> None:
        self.disk.unlink(self.path)
        self.size = self.synced = 0
        self.named = False


def _receive(transport: Transport, path: str, length: int, file: _Part) -> None:
    """Append what one request brings, never beyond `length`; raise `Broken` for an answer to another question."""
    had = file.size
    body = transport.get(path, had)
    if body.start not in (0, had):
        raise Broken(f"{path}: asked for byte {had}, got byte {body.start}")
    if body.total is not None and body.total != length:
        raise DownloadError(
            path, f"{length} bytes", f"a file of {body.total}", "publish it again: a signed file never changes its size"
        )
    # A server that cannot resume sends all of it: what we have is skipped, so that a cut costs nothing twice on disk.
    skip = had - body.start
    for block in body.blocks:
        new = block[skip : skip + length - file.size]
        skip = max(0, skip - len(block))
        if new:
            file.add(new)
        elif file.size >= length:
            return  # the whole file is here, and more keeps coming
