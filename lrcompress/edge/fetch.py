"""Bring one file of known length and hash over a bad link: what arrived is kept, and the rest is asked for.

fetch(transport, "targets/…", length=n, part=store.part(sha), disk=disk)
store.adopt(sha)                                  # which checks the hash
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ..errors import DownloadError, HostError
from .disk import Disk
from .transport import Broken, Transport, Unavailable

#: Tries in a row without a new byte, and tries in all, before giving up until the next call.
MAX_IDLE_TRIES, MAX_TRIES = 4, 200
#: A stream slower than this is given up, so that a server that drips cannot hold a device.
SLOWEST_BYTES, SLOWEST_S = 1024, 30.0
#: Statuses that may pass by themselves.
_PASSING = {408, 425, 429}


def fetch(
    transport: Transport, path: str, *, length: int, part: Path, disk: Disk, sleep: Callable[[float], None] = time.sleep
) -> bool:
    """Grow `part` to `length` bytes; return whether any of them were there before.

    Raises `DownloadError` when tries are used up or the file is gone (what arrived stays), `HostError` for a full disk.
    """
    had = resumed = _size(part)
    if had > length:
        disk.unlink(part)
        had = resumed = 0
    idle, why = 0, ""
    for _ in range(MAX_TRIES):
        if had == length:
            return resumed > 0
        if idle:
            sleep(min(30.0, 0.5 * 2**idle))
        try:
            _receive(transport, path, had, length, part, disk)
            why = "the connection ended early"
        except Unavailable as e:
            if e.status == 416:
                disk.unlink(part)
            elif e.status < 500 and e.status not in _PASSING:
                raise DownloadError(
                    path, "the file that was signed", f"status {e.status}", "publish it again, or check the URL"
                ) from e
            why = str(e)
        except Broken as e:
            why = str(e)
        except HostError:
            disk.unlink(part)
            raise
        have = _size(part)
        idle, had = 0 if have > had else idle + 1, have
        if idle > MAX_IDLE_TRIES:
            break
    raise DownloadError(path, f"{length} bytes", f"{had}: {why}", "it goes on from there with the next update")


def _receive(transport: Transport, path: str, had: int, length: int, part: Path, disk: Disk) -> None:
    """Append what one request brings, never beyond `length`; raise `Broken` for an answer to another question."""
    body = transport.get(path, had)
    if body.start not in (0, had):
        raise Broken(f"{path}: asked for byte {had}, got byte {body.start}")
    if body.total is not None and body.total != length:
        raise DownloadError(
            path, f"{length} bytes", f"a file of {body.total}", "publish it again: a signed file never changes its size"
        )
    # A server that cannot resume sends all of it: what we have is skipped, so that a cut costs nothing twice on disk.
    skip, grown = had - body.start, False
    mark, since, received = time.monotonic(), 0, 0
    try:
        for block in body.blocks:
            received += len(block)
            new = block[skip : skip + length - had]
            skip = max(0, skip - len(block))
            if new:
                disk.append(part, new)
                had, grown = had + len(new), True
            if had >= length:
                return
            if time.monotonic() - mark > SLOWEST_S:
                if received - since < SLOWEST_BYTES:
                    raise Broken(f"{path}: {received - since} bytes in {SLOWEST_S:.0f} s")
                mark, since = time.monotonic(), received
    finally:
        if grown:
            disk.sync(part)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
