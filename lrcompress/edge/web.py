"""A repository behind a web server: any static one will do."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import urllib3

from .._version import __version__
from ..errors import DeviceStateError
from .settings import Settings
from .transport import BLOCK_BYTES, Body, Broken, Traffic, Unavailable, paced

#: Silence on the line, and the whole of an answer's head, in seconds.
TIMEOUT_S, HEAD_S = 15.0, 30.0


class _Prompt:
    """A connection whose answers must begin in time: a head that drips resets every timeout but this one."""

    sock: socket.socket | None

    def getresponse(self) -> Any:
        sock, late = self.sock, threading.Event()

        def hang_up() -> None:
            late.set()
            with contextlib.suppress(OSError):
                if sock is not None:
                    sock.shutdown(socket.SHUT_RDWR)

        watch = threading.Timer(HEAD_S, hang_up)
        watch.daemon = True
        watch.start()
        try:
            answer = super().getresponse()  # type: ignore[misc]
        finally:
            watch.cancel()
        if late.is_set():  # a head that was cut reads like one that is whole
            raise TimeoutError(f"the head of the answer took more than {HEAD_S:.0f} s")
        return answer


class _Http(_Prompt, urllib3.connection.HTTPConnection):
    """Plain."""


class _Https(_Prompt, urllib3.connection.HTTPSConnection):
    """With TLS."""


class _HttpPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Http


class _HttpsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _Https


class HttpTransport:
    """A repository behind any static web server, over one kept connection."""

    _RANGE = re.compile(r"bytes (\d{1,15})-\d{1,15}/(\d{1,15}|\*)")

    def __init__(
        self, url: str, settings: Settings | None = None, *, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        settings = settings or Settings()
        self.traffic, self._base, self._sleep = Traffic(), url.rstrip("/"), sleep
        self._most = settings.max_bytes_per_s
        _check_token(settings, url)
        self._headers = {"Accept-Encoding": "identity", "User-Agent": f"lrcompress/{__version__}", **_bearer(settings)}
        retries = urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=3)
        timeout = urllib3.Timeout(connect=TIMEOUT_S, read=TIMEOUT_S)
        options: dict[str, Any] = {"retries": retries, "timeout": timeout, "num_pools": 4}
        context = _tls(settings)
        if context is not None:
            options["ssl_context"] = context
        if settings.proxy is None:
            self._pool: urllib3.PoolManager = urllib3.PoolManager(**options)
        else:
            self._pool = urllib3.ProxyManager(settings.proxy, **options)
        self._pool.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}

    def get(self, path: str, start: int = 0) -> Body:
        self.traffic.requests += 1
        headers = {**self._headers, "Range": f"bytes={start}-"} if start else self._headers
        try:
            answer = self._pool.request("GET", f"{self._base}/{quote(path)}", headers=headers, preload_content=False)
        except (urllib3.exceptions.HTTPError, OSError) as e:
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
        return Body(begin, total, self._blocks(answer, path))

    def _blocks(self, answer: urllib3.BaseHTTPResponse, path: str) -> Iterator[bytes]:
        whole = False
        try:
            yield from paced(self._received(answer), path, self._most, self._sleep)
            whole = True
        finally:
            answer.release_conn() if whole else answer.close()

    def _received(self, answer: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
        try:
            # read1: what has arrived, at once. A full block would be lost with the connection that never completed it.
            while block := answer.read1(BLOCK_BYTES):
                self.traffic.bytes += len(block)
                yield block
        except (urllib3.exceptions.HTTPError, OSError) as e:
            raise Broken(f"{self._base}: {_reason(e)}") from e


def _bearer(settings: Settings) -> dict[str, str]:
    """Return the header of the token, if there is one. Raises `DeviceStateError` for a token file that holds none."""
    token = settings.bearer_token
    if settings.bearer_token_file is not None:
        try:
            token = Path(settings.bearer_token_file).read_text().strip()
        except (OSError, ValueError) as e:
            got = e.strerror if isinstance(e, OSError) and e.strerror else "no text"
            raise DeviceStateError(
                settings.bearer_token_file, "the bearer token", got, "see bearer_token_file in device.json"
            ) from e
        if not token or any(ord(c) < 33 or ord(c) > 126 for c in token):
            raise DeviceStateError(
                settings.bearer_token_file,
                "one line of a bearer token",
                "something else",
                "see bearer_token_file in device.json",
            )
    return {} if token is None else {"Authorization": f"Bearer {token}"}


def _check_token(settings: Settings, url: str) -> None:
    """Refuse to send a token in the clear, except within this machine."""
    parts, given = urlsplit(url), settings.bearer_token or settings.bearer_token_file
    if given and parts.scheme.lower() != "https" and parts.hostname not in ("127.0.0.1", "::1", "localhost"):
        raise DeviceStateError(
            "device.json: bearer_token", "an https:// address to send it to", url, "use https, or no token"
        )


def _tls(settings: Settings) -> ssl.SSLContext | None:
    """Return a context with the fleet's own authority and this device's certificate, where the settings name them."""
    if settings.ca_file is None and settings.cert_file is None:
        return None
    name = settings.ca_file
    try:
        context = ssl.create_default_context(cafile=name)
        if settings.cert_file is not None:
            name = settings.cert_file
            context.load_cert_chain(settings.cert_file, settings.key_file)
    except OSError as e:  # ssl.SSLError is one
        raise DeviceStateError(
            name,
            "certificates and a key in PEM",
            e.strerror or str(e),
            "see ca_file, cert_file, key_file in device.json",
        ) from e
    return context


def _length(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None


def _reason(e: BaseException) -> str:
    """Return what a person can act on, without the classes around it."""
    inner = getattr(e, "reason", None)
    return str(inner) if isinstance(inner, BaseException) else str(e) or type(e).__name__
