"""Where a repository's files come from: http(s), `file://`, or a folder such as a USB stick. Counts what it moves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from ..errors import CommandError
from ..files import contained

BLOCK_BYTES = 64 << 10


class Unavailable(Exception):
    """The server answered, with a status that is not the file."""

    def __init__(self, path: str, status: int) -> None:
        super().__init__(f"{path}: status {status}")
        self.status = status


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


def open_transport(url: str) -> Transport:
    """Return the transport for an address. Raises `CommandError` for a scheme that is none of ours."""
    scheme = urlsplit(url).scheme.lower()
    if scheme in ("http", "https"):
        from .web import HttpTransport  # only where there is a web: serving needs none of its packages

        return HttpTransport(url)
    if scheme == "file":
        return FolderTransport(Path(unquote(urlsplit(url).path)))
    if "://" in url:
        raise CommandError("--url", "http://, https://, file:// or a folder", url)
    return FolderTransport(Path(url))


class FolderTransport:
    """A repository in a folder."""

    def __init__(self, folder: Path) -> None:
        self.traffic, self._folder = Traffic(), folder

    def get(self, path: str, start: int = 0) -> Body:
        self.traffic.requests += 1
        try:
            file = contained(self._folder, path)
            if not self._folder.is_dir():
                raise Broken(f"{self._folder}: no such folder")
            size = file.stat().st_size
        except (FileNotFoundError, NotADirectoryError, ValueError) as e:
            raise Unavailable(path, 404) from e
        except OSError as e:
            raise Broken(f"{path}: {e.strerror or e}") from e
        return Body(start, size, self._blocks(file, start))

    def _blocks(self, file: Path, start: int) -> Iterator[bytes]:
        try:
            with open(file, "rb") as f:
                f.seek(start)
                while block := f.read(BLOCK_BYTES):
                    self.traffic.bytes += len(block)
                    yield block
        except OSError as e:
            raise Broken(f"{file}: {e.strerror or e}") from e
