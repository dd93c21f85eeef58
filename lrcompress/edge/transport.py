"""Where a repository's files come from: http(s), `file://`, or a folder such as a USB stick. Counts what it moves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, urlsplit
from urllib.request import url2pathname

import urllib3

from .._version import __version__
from ..errors import CommandError
from ..files import contained

BLOCK_BYTES = 64 << 10
TIMEOUT_S = 15.0


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
        return HttpTransport(url)
    if scheme == "file":
        return FolderTransport(Path(url2pathname(urlsplit(url).path)))
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


class HttpTransport:
    """A repository behind any static web server, over one kept connection."""

    _RANGE = re.compile(r"bytes (\d{1,15})-\d{1,15}/(\d{1,15}|\*)")

    def __init__(self, url: str) -> None:
        self.traffic, self._base = Traffic(), url.rstrip("/")
        retries = urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=3)
        timeout = urllib3.Timeout(connect=TIMEOUT_S, read=TIMEOUT_S)
        self._pool = urllib3.PoolManager(retries=retries, timeout=timeout, num_pools=4)

    def get(self, path: str, start: int = 0) -> Body:
        self.traffic.requests += 1
        headers = {"Accept-Encoding": "identity", "User-Agent": f"lrcompress/{__version__}"}
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            answer = self._pool.request("GET", f"{self._base}/{quote(path)}", headers=headers, preload_content=False)
        except urllib3.exceptions.HTTPError as e:
            raise Broken(f"{self._base}: {_reason(e)}") from e
        if answer.status not in (200, 206):
            answer.close()
            raise Unavailable(path, answer.status)
        begin, total = 0, _length(answer.headers.get("Content-Length"))
        if answer.status == 206:
            found = self._RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if found is None:
                answer.close()
                raise Broken(f"{path}: 206 without a Content-Range")
            begin, total = int(found[1]), _length(found[2])
        return Body(begin, total, self._blocks(answer))

    def _blocks(self, answer: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
        whole = False
        try:
            # read1: what has arrived, at once. A full block would be lost with the connection that never completed it.
            while block := answer.read1(BLOCK_BYTES):
                self.traffic.bytes += len(block)
                yield block
            whole = True
        except (urllib3.exceptions.HTTPError, OSError) as e:
            raise Broken(f"{self._base}: {_reason(e)}") from e
        finally:
            answer.release_conn() if whole else answer.close()


def _length(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _reason(e: BaseException) -> str:
    """Return what a person can act on, without the classes around it."""
    inner = getattr(e, "reason", None)
    return str(inner) if isinstance(inner, BaseException) else str(e) or type(e).__name__
