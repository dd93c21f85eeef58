"""A repository behind a web server: any static one will do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import quote

import urllib3

from .._version import __version__
from .transport import BLOCK_BYTES, Body, Broken, Traffic, Unavailable

TIMEOUT_S = 15.0


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
