"""A small receiver of status records over HTTP, for behind a reverse proxy: it speaks no TLS and trusts no address.

POST /  (or any path)     204 taken · 400 malformed · 403 unknown device, bad signature · 409 replay · 413 too large
                          422 from the future, another group · 503 the disk
GET  /healthz             200
"""

from __future__ import annotations

import contextlib
import http.server
from collections.abc import Callable
from typing import Any

from ..errors import LrcompressError
from .intake import MAX_RECORD_BYTES, Intake, Refusal

#: A sender that stops in the middle holds a thread for so long.
TIMEOUT_S = 15


class Collector(http.server.ThreadingHTTPServer):
    """The receiver; `serve_forever` until `shutdown`."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, intake: Intake, host: str, port: int, note: Callable[[str], None] = lambda line: None) -> None:
        self.intake, self.note = intake, note
        super().__init__((host, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A sender that went away is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Collector
    timeout = TIMEOUT_S
    server_version, sys_version = "lrcompress", ""
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 9 or int(length) > MAX_RECORD_BYTES:
            self.close_connection = True
            self._answer(413 if length.isdecimal() else 411, f"a Content-Length of at most {MAX_RECORD_BYTES}")
            return
        try:
            self.server.intake.take(self.rfile.read(int(length)))
        except Refusal as e:
            self.server.note(f"refused: {e}")
            self._answer(e.status, str(e))
        except LrcompressError as e:
            self.server.note(str(e))
            self._answer(503, "try again later")
        else:
            self._answer(204, "")

    def do_GET(self) -> None:
        self._answer(200 if self.path == "/healthz" else 404, "")

    def _answer(self, status: int, line: str) -> None:
        data = (line + "\n").encode() if line else b""
        with contextlib.suppress(OSError):
            self.send_response(status)
            if status != 204:
                self.send_header("Content-Type", "text/plain; charset=utf-8")
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: a proxy in front writes the access log."""
