"""Where a repository's files come from: http(s), `file://`, or a folder such as a USB stick. Counts what it moves.

Every body comes through `paced`: no faster than the settings allow, and given up where it only drips, so that neither
a link nor a server can hold a device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit

from ..errors import CommandError
from ..files import contained

if TYPE_CHECKING:
    from .settings import Settings

BLOCK_BYTES = 64 << 10
#: A stream that brings less than this in that time is given up.
SLOWEST_BYTES, SLOWEST_S = 1024, 30.0


class Unavailable(Exception):
    """The server answered, with a status that is not the file."""

    def __init__(self, path: str, status: int) -> None:
        super().__init__(f"{path}: status {status}")
        self.status = status

    @property
    def passing(self) -> bool:
        """Whether it may pass by itself."""
        return self.status >= 500 or self.status in (408, 425, 429)


class Broken(Exception):
    """The bytes stopped coming, or never began to."""


@dataclass
class Traffic:
    """Requests made and body bytes received."""

    requests: int = 0
    bytes: int = 0


@dataclass
class Body:
    """An answer: `blocks` begin at `start` of a file of `total` bytes, where that is known."""

    start: int
    total: int | None
    blocks: Iterator[bytes]


class Transport(Protocol):
    """Bytes of a repository by relative path, from an offset."""

    traffic: Traffic

    def get(self, path: str, start: int = 0) -> Body:
        """Open `path`. Raises `Unavailable` or `Broken`; so does reading the blocks."""
        ...


def open_transport(
    url: str, settings: Settings | None = None, *, sleep: Callable[[float], None] = time.sleep
) -> Transport:
    """Return the transport for an address. Raises `CommandError` for a scheme that is none of ours."""
    scheme = urlsplit(url).scheme.lower()
    if scheme in ("http", "https"):
        from .web import HttpTransport  # only where there is a web: serving needs none of its packages

        return HttpTransport(url, settings, sleep=sleep)
    if scheme == "file":
        folder = Path(unquote(urlsplit(url).path))
    elif "://" in url:
        raise CommandError("--url", "http://, https://, file:// or a folder", url)
    else:
        folder = Path(url)
    return FolderTransport(folder, None if settings is None else settings.max_bytes_per_s, sleep=sleep)


def paced(
    blocks: Iterator[bytes], where: str, most_per_s: float | None, sleep: Callable[[float], None]
) -> Iterator[bytes]:
    """Yield `blocks`, at most `most_per_s` bytes of them in a second. Raises `Broken` for a stream that only drips."""
    started = mark = time.monotonic()
    received = since = 0
    for block in blocks:
        received += len(block)
        yield block
        if most_per_s is not None:
            early = received / most_per_s - (time.monotonic() - started)
            if early > 0:
                sleep(early)
        if time.monotonic() - mark > SLOWEST_S:
            slowest = SLOWEST_BYTES if most_per_s is None else min(SLOWEST_BYTES, most_per_s * SLOWEST_S / 2)
            if received - since < slowest:
                raise Broken(f"{where}: {received - since} bytes in {SLOWEST_S:.0f} s")
            mark, since = time.monotonic(), received


class FolderTransport:
    """A repository in a folder."""

    def __init__(
        self, folder: Path, most_per_s: float | None = None, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.traffic, self._folder, self._most, self._sleep = Traffic(), folder, most_per_s, sleep

    def get(self, path: str, start: int = 0) -> Body:
        self.traffic.requests += 1
        try:
            file = contained(self._folder, path)
            if not self._folder.is_dir():
                raise Broken(f"{self._folder}: no such folder")
            if not file.is_file():  # a pipe or a device in its place would never end
                raise Unavailable(path, 404)
            size = file.stat().st_size
        except (FileNotFoundError, NotADirectoryError, ValueError) as e:
            raise Unavailable(path, 404) from e
        except OSError as e:
            raise Broken(f"{path}: {e.strerror or e}") from e
        return Body(start, size, paced(self._blocks(file, start), str(file), self._most, self._sleep))

    def _blocks(self, file: Path, start: int) -> Iterator[bytes]:
        try:
            with open(file, "rb") as f:
                f.seek(start)
                while block := f.read(BLOCK_BYTES):
                    self.traffic.bytes += len(block)
                    yield block
        except OSError as e:
            raise Broken(f"{file}: {e.strerror or e}") from e
