"""A link and a server that do everything wrong: the update arrives at last, or ends in one line; serving never changes."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrcompress.edge import fetch as fetching
from lrcompress.edge import transport as transports
from lrcompress.edge import web
from lrcompress.edge.disk import Disk
from lrcompress.edge.fetch import fetch
from lrcompress.edge.settings import Settings
from lrcompress.edge.transport import open_transport
from lrcompress.edge.web import HttpTransport
from lrcompress.errors import DeviceStateError, DownloadError
from tests.support.certificates import certificates
from tests.support.fleet import Fleet, answers

CONTENT = bytes(range(256)) * 800  # 200 KiB


class Faulty(http.server.BaseHTTPRequestHandler):
    """Serves a folder, or CONTENT; `fault(self, path, number of the request)` may answer in its place and return True."""

    protocol_version = "HTTP/1.1"
    folder: Path | None = None
    fault: Any = None
    sent = dripped = 0
    seen: list[tuple[str, dict[str, str]]] = []

    def log_message(self, *a: object) -> None: ...

    def body(self) -> bytes | None:
        if self.folder is None:
            return CONTENT
        path = self.folder / self.path.split("://")[-1].partition("/")[2].lstrip("/")
        return path.read_bytes() if path.is_file() else None

    def do_GET(self) -> None:
        cls = type(self)
        cls.seen.append((self.path, dict(self.headers)))
        if cls.fault is not None and cls.fault(self, self.path, len(cls.seen) - 1):
            return
        self.whole()

    def whole(self, *, cut: int | None = None) -> None:
        """Answer as a good server does; with `cut`, hang up after so many bytes."""
        data = self.body()
        if data is None:
            self.status(404)
            return
        start = int(self.headers["Range"][6:-1]) if "Range" in self.headers else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.send(data[start:] if cut is None else data[start : start + cut])
        if cut is not None and start + cut < len(data):
            self.hang_up()

    def send(self, data: bytes) -> bool:
        """Send; return whether somebody is still there."""
        type(self).sent += len(data)
        try:
            self.wfile.write(data)
            self.wfile.flush()
        except OSError:
            return False
        return True

    def status(self, code: int, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


def handler(fault: Any = None, folder: Path | None = None) -> type[Faulty]:
    made = type(
        "F",
        (Faulty,),
        {"fault": staticmethod(fault) if fault else None, "folder": folder, "sent": 0, "dripped": 0, "seen": []},
    )
    return made


@contextlib.contextmanager
def serving(kind: type[Faulty], context: ssl.SSLContext | None = None) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    server.daemon_threads = True
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"{'http' if context is None else 'https'}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time-outs of a second: what happens after them does not depend on how long they are.

    On a machine that is busy elsewhere a good answer may come too late as well; more tries make up for that.
    """
    monkeypatch.setattr(web, "TIMEOUT_S", 1.0)
    monkeypatch.setattr(web, "HEAD_S", 1.5)
    monkeypatch.setattr(transports, "SLOWEST_S", 1.0)
    monkeypatch.setattr(fetching, "MAX_IDLE_TRIES", 12)


def got(tmp_path: Path, kind: type[Faulty], **settings: Any) -> bytes:
    part = tmp_path / "a.part"
    with serving(kind) as url:
        try:
            fetch(
                HttpTransport(url, Settings(**settings)), "targets/a", length=len(CONTENT), part=part, disk=Disk(), sleep=lambda s: None
            )  # fmt: skip
        finally:
            kind.left = part.read_bytes() if part.exists() else b""  # type: ignore[attr-defined]
    return part.read_bytes()


def only(first: int, fault: Any) -> Any:
    """Return a fault that happens to the first requests only."""
    return lambda self, path, n: n < first and (fault(self, path, n), True)[1]


# the payload ----------------------------------------------------------------------------------------------------------


def test_cut_every_four_kibibytes_costs_nothing_twice(tmp_path: Path) -> None:
    kind = handler(lambda self, path, n: (self.whole(cut=4096), True)[1])
    assert got(tmp_path, kind) == CONTENT
    assert kind.sent <= 1.05 * len(CONTENT) and len(kind.seen) >= len(CONTENT) // 4096


def test_twenty_cuts_and_twenty_restarts_cost_at_most_a_twentieth(tmp_path: Path) -> None:
    """Each request is cut at a random place, and each is made by a new process's transport, as after a restart."""
    chance = np.random.default_rng(3)
    cuts = iter([int(c) for c in chance.integers(1, 2 * len(CONTENT) // 21, 20)])
    kind = handler(lambda self, path, n: n < 20 and (self.whole(cut=next(cuts)), True)[1])
    part = tmp_path / "a.part"
    with serving(kind) as url, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetching, "MAX_TRIES", 1)
        patch.setattr(fetching, "BYTES_PER_TRY", 1 << 30)
        for _ in range(20):
            with contextlib.suppress(DownloadError):
                fetch(HttpTransport(url), "a", length=len(CONTENT), part=part, disk=Disk(), sleep=lambda s: None)
        fetch(HttpTransport(url), "a", length=len(CONTENT), part=part, disk=Disk(), sleep=lambda s: None)
    assert part.read_bytes() == CONTENT and len(kind.seen) == 21
    assert kind.sent <= 1.05 * len(CONTENT)


def stall(self: Faulty, path: str, n: int) -> None:
    data = self.body() or b"nothing"
    self.send_response(200)
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    self.send(data[: len(data) // 3])
    time.sleep(2.0)
    self.hang_up()


#: Bytes of a drip, one every tenth of a second: several times what is waited for.
DRIPS = 100


def drip(self: Faulty, data: bytes) -> None:
    """Send byte by byte until nobody is there any more."""
    for c in data:
        if not self.send(bytes([c])):
            break
        type(self).dripped += 1
        time.sleep(0.1)
    self.hang_up()


def drip_head(self: Faulty, path: str, n: int) -> None:
    drip(self, b"HTTP/1.1 200 OK\r\nX-Wait: " + b"a" * DRIPS)


def drip_body(self: Faulty, path: str, n: int) -> None:
    data = self.body() or b"nothing"
    self.send_response(200)
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    drip(self, data[: min(DRIPS, len(data) - 1)])


def wrong_range(first: int, total: str) -> Any:
    def fault(self: Faulty, path: str, n: int) -> None:
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{len(CONTENT) - 1}/{total}")
        self.send_header("Content-Length", "10")
        self.end_headers()
        self.send(b"x" * 10)

    return fault


def no_range(self: Faulty, path: str, n: int) -> None:
    self.send_response(206)
    self.send_header("Content-Length", "10")
    self.end_headers()
    self.send(b"x" * 10)


def no_http(self: Faulty, path: str, n: int) -> None:
    self.send(b"\0\1\2 this is no HTTP\r\n\r\n")
    self.hang_up()


@pytest.mark.parametrize(
    "fault",
    [
        stall, drip_head, drip_body, no_range, no_http, wrong_range(1005, str(len(CONTENT))), wrong_range(1 << 40, "*"),
        lambda s, p, n: s.hang_up(), lambda s, p, n: s.status(500), lambda s, p, n: s.status(503), lambda s, p, n: s.status(429),
        lambda s, p, n: s.status(408), lambda s, p, n: s.status(302, Location="/again"),
    ],
    ids=["stall", "slow loris, head", "slow loris, body", "206 without a range", "no HTTP", "206 of another place", "206 of nowhere",
         "hung up", "500", "503", "429", "408", "redirect loop"],
)  # fmt: skip
def test_a_fault_that_passes_is_survived(tmp_path: Path, fault: Any) -> None:
    """Twice the fault, then a good server."""
    kind = handler(only(5 if "redirect" in str(fault) else 2, fault))
    (tmp_path / "a.part").write_bytes(CONTENT[:1000])
    assert got(tmp_path, kind) == CONTENT


@pytest.mark.parametrize(
    "fault", [stall, drip_head, lambda s, p, n: s.status(500), lambda s, p, n: s.status(302, Location="/x")]
)
def test_a_fault_that_stays_ends_in_one_line_and_keeps_what_came(
    tmp_path: Path, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "MAX_IDLE_TRIES", 1)
    kind = handler(lambda self, path, n: (fault(self, path, n), True)[1])
    (tmp_path / "a.part").write_bytes(CONTENT[:1000])
    with pytest.raises(DownloadError, match="goes on from there") as caught:
        got(tmp_path, kind)
    assert kind.left[:1000] == CONTENT[:1000] and "\n" not in str(caught.value)  # type: ignore[attr-defined]


def test_a_head_that_never_ends_is_no_answer() -> None:
    """When its time is up the connection is closed, and what came of the head must not count as an answer of no bytes."""
    kind = handler(lambda s, p, n: (drip_head(s, p, n), True)[1])
    with serving(kind) as url, pytest.raises(transports.Broken):
        list(HttpTransport(url).get("a").blocks)
    assert kind.dripped < DRIPS / 2


def test_a_body_that_drips_is_given_up() -> None:
    """Every byte resets the timeout of the socket: only what comes in all tells a slow link from one that holds us."""
    kind = handler(lambda s, p, n: (drip_body(s, p, n), True)[1])
    with serving(kind) as url, pytest.raises(transports.Broken, match="bytes in 1 s"):
        list(HttpTransport(url).get("a").blocks)
    assert kind.dripped < DRIPS / 2


def test_a_server_without_range_is_used_as_it_is(tmp_path: Path) -> None:
    def whole(self: Faulty, path: str, n: int) -> bool:
        self.headers.replace_header("Range", "bytes=0-") if "Range" in self.headers else None
        self.whole(cut=150_000 if n == 0 else None)
        return True

    kind = handler(whole)
    assert got(tmp_path, kind) == CONTENT and len(kind.seen) == 2


@pytest.mark.parametrize("total", [10, len(CONTENT) + 1, 1 << 40])
def test_a_file_of_another_size_is_final(tmp_path: Path, total: int) -> None:
    (tmp_path / "a.part").write_bytes(CONTENT[:1000])
    kind = handler(lambda self, path, n: (wrong_range(1000, str(total))(self, path, n), True)[1])
    with pytest.raises(DownloadError, match=f"a file of {total}"):
        got(tmp_path, kind)
    assert len(kind.seen) == 1


def test_an_endless_body_is_read_no_further_than_it_may_be(tmp_path: Path) -> None:
    def endless(self: Faulty, path: str, n: int) -> bool:
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(CONTENT)
            for _ in range(5000):
                self.wfile.write(b"x" * 65536)
        self.hang_up()
        return True

    assert got(tmp_path, handler(endless)) == CONTENT


# settings -------------------------------------------------------------------------------------------------------------


def test_the_bandwidth_limit_is_kept() -> None:
    slept: list[float] = []
    blocks = transports.paced(iter([b"x" * 1000] * 50), "a", 20_000, slept.append)
    assert sum(map(len, blocks)) == 50_000
    assert max(slept) == pytest.approx(2.5, abs=0.2)  # every wait is for the whole of what came too early


def test_a_proxy_carries_every_request(tmp_path: Path) -> None:
    kind = handler()
    with serving(kind) as proxy:
        transport = open_transport("http://updates.example.invalid/model", Settings(proxy=proxy))
        assert b"".join(transport.get("metadata/a").blocks) == CONTENT
    assert kind.seen[0][0] == "http://updates.example.invalid/model/metadata/a"


def test_a_token_goes_to_the_repository_and_to_nobody_else(tmp_path: Path) -> None:
    other = handler()
    with serving(other) as elsewhere:
        kind = handler(lambda s, p, n: "metadata" not in p and (s.status(302, Location=f"{elsewhere}/x"), True)[1])
        with serving(kind) as url:
            (tmp_path / "token").write_text("s3cret\n")
            transport = HttpTransport(url, Settings(bearer_token_file=str(tmp_path / "token")))
            for path in ("metadata/a", "targets/a"):
                assert b"".join(transport.get(path).blocks) == CONTENT
    assert [h.get("Authorization") for _, h in kind.seen] == ["Bearer s3cret"] * 2
    assert [h.get("Authorization") for _, h in other.seen] == [None]
    with pytest.raises(DeviceStateError, match="https"):
        HttpTransport("http://updates.example/", Settings(bearer_token="s3cret"))
    for content in (b"", b"two words", b"\xff\xfe"):
        (tmp_path / "token").write_bytes(content)
        with pytest.raises(DeviceStateError, match="token") as caught:
            HttpTransport(url, Settings(bearer_token_file=str(tmp_path / "token")))
        assert "words" not in str(caught.value)


def test_mutual_tls(tmp_path: Path) -> None:
    certificates(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    context.load_verify_locations(tmp_path / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    ca, cert, key = (str(tmp_path / n) for n in ("ca.pem", "device.pem", "device.key"))
    with serving(handler(), context) as url:
        good = HttpTransport(url, Settings(ca_file=ca, cert_file=cert, key_file=key))
        assert b"".join(good.get("a").blocks) == CONTENT
        for settings in (Settings(ca_file=ca), Settings(), Settings(cert_file=cert, key_file=key)):
            with pytest.raises((transports.Broken, transports.Unavailable)):
                b"".join(HttpTransport(url, settings).get("a").blocks)
    with pytest.raises(DeviceStateError, match="PEM"):
        HttpTransport(url, Settings(ca_file=str(tmp_path / "nothing")))


# a whole device -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [stall, drip_head, no_http, lambda s, p, n: s.status(503), lambda s, p, n: s.whole(cut=100)]
)
def test_a_device_lives_through_any_link(tmp_path: Path, fault: Any) -> None:
    """The fault on every second request, of metadata and of payload: the device serves throughout, and gets there."""
    fleet = Fleet(tmp_path)
    fleet.add("first")
    kind = handler(lambda s, p, n: n % 2 == 0 and (fault(s, p, n), True)[1], fleet.repo)
    before = answers(fleet.device())
    with serving(kind) as url:
        (fleet.at / "device.json").write_text(json.dumps({"schema": 1, "url": f"{url}/"}))
        for _ in range(6):
            device = fleet.device()
            d = device.update()
            if d["state"] == "updated":
                break
            assert (d["state"], d["error"]["code"]) == ("failed", 8), d
            np.testing.assert_array_equal(answers(fleet.device()), before)
        assert d["to_seq"] == 1 and device.status()["refused"] == []
