"""State files and downloads of a device: what a crash, another hand or a bad server leaves is told from what is good."""

from __future__ import annotations

import http.server

import pytest

from lrcompress.edge import Device
from lrcompress.edge.disk import Disk
from lrcompress.edge.fetch import fetch
from lrcompress.edge.state import COPIES, Entry, Pending, State, StateFiles, decode, encode
from lrcompress.edge.transport import Broken, FolderTransport, Unavailable, open_transport
from lrcompress.edge.web import HttpTransport
from lrcompress.errors import DownloadError
from lrcompress.files import sha256_bytes
from tests.support.fleet import Fleet, made, payload_bytes, release, served


@pytest.fixture
def transport(tmp_path):
    (tmp_path / "www").mkdir()
    return FolderTransport(tmp_path / "www")


# state ----------------------------------------------------------------------------------------------------------------

SHA = sha256_bytes(b"a")
FULL = State(3, 7, SHA, Entry(SHA, 7), Entry(sha256_bytes(b"b"), 6), Pending(sha256_bytes(b"c"), 8, 1), None).refuse(
    sha256_bytes(b"d"), 5, "why"
)


def test_a_state_reads_back_and_any_flipped_byte_is_noticed():
    data = encode(FULL)
    assert decode(data) == FULL
    for i in range(len(data) - 1):
        changed = data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :]
        assert decode(changed) is None or decode(changed) == FULL, i
    assert decode(b"") is None and decode(data[:40]) is None


def test_one_destroyed_copy_costs_nothing_and_two_are_told(tmp_path):
    files = StateFiles(tmp_path, Disk())
    for generation in range(1, 4):
        state = files.write(State(seq=generation))
        assert state.generation == generation
    newest = max(COPIES, key=lambda n: decode((tmp_path / n).read_bytes()).generation)
    (tmp_path / newest).write_bytes(b"rot")
    assert files.read().seq == 2
    assert files.write(State(seq=9)).generation == 3  # over the destroyed copy
    assert files.read().seq == 9
    for name in COPIES:
        (tmp_path / name).unlink()
    assert files.read() == State() and not files.read().readable


# downloads ------------------------------------------------------------------------------------------------------------


class Link(http.server.BaseHTTPRequestHandler):
    """A server that does what `script` says, one entry per request; counts what it sent."""

    content = bytes(range(256)) * 512
    script: list = []
    sent = 0
    asked: list = []

    def __init__(self, *args, directory=None, **options):
        super().__init__(*args, **options)

    def log_message(self, *a):
        pass

    def do_GET(self):
        cls = type(self)
        step = cls.script.pop(0) if cls.script else "whole"
        asked = self.headers.get("Range")
        cls.asked.append(asked)
        start = int(asked[6:-1]) if asked and step != "no-range" else 0
        body = cls.content[start + (step == "wrong-offset") :]
        if isinstance(step, int):
            self.send_response(step)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if asked and step not in ("no-range", "200") else 200)
        if asked and step not in ("no-range", "no-content-range"):
            at = start + (1 if step == "wrong-offset" else 0)
            self.send_header("Content-Range", f"bytes {at}-{len(cls.content) - 1}/{len(cls.content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = isinstance(step, str) and step.startswith("cut ")
        if cut:
            body = body[: int(step[4:])]
        cls.sent += len(body)
        self.wfile.write(body)
        self.wfile.flush()
        if cut:
            self.connection.close()


def link(script, content=None):
    return type(
        "L",
        (Link,),
        {"script": list(script), "sent": 0, "asked": [], **({} if content is None else {"content": content})},
    )


def get(tmp_path, handler, **options):
    part = tmp_path / "p.part"
    with served(tmp_path, handler) as url:
        try:
            return fetch(
                HttpTransport(url),
                "targets/a",
                length=len(handler.content),
                part=part,
                disk=Disk(),
                sleep=lambda s: None,
                **options,
            )
        finally:
            handler.got = part.read_bytes() if part.exists() else b""


def test_twenty_cuts_cost_less_than_a_twentieth(tmp_path):
    handler = link(["cut 6000"] * 20)
    get(tmp_path, handler)
    assert handler.got == handler.content
    assert handler.sent <= 1.05 * len(handler.content)
    assert sum(a is not None for a in handler.asked) == 20


@pytest.mark.parametrize(
    "script",
    [
        ["no-range"],
        ["cut 5000", "no-range"],
        [503, 503],
        ["cut 5000", "wrong-offset"],
        ["cut 5000", "no-content-range"],
        ["cut 5000", 416],
        [429],
    ],
)
def test_bad_answers_are_survived(tmp_path, script):
    handler = link(script)
    get(tmp_path, handler)
    assert handler.got == handler.content


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_what_is_gone_is_not_asked_for_again(tmp_path, status):
    handler = link([status] * 9)
    with pytest.raises(DownloadError, match=str(status)):
        get(tmp_path, handler)
    assert len(handler.asked) == 1


def test_giving_up_is_an_answer_and_keeps_what_arrived(tmp_path):
    handler = link(["cut 7000"] + [503] * 99)
    with pytest.raises(DownloadError, match="goes on from there"):
        get(tmp_path, handler)
    assert handler.got == handler.content[:7000] and len(handler.asked) < 10


def test_a_part_that_is_longer_than_the_file_is_thrown_away(tmp_path):
    handler = link([])
    (tmp_path / "p.part").write_bytes(b"x" * (len(handler.content) + 1))
    get(tmp_path, handler)
    assert handler.got == handler.content


def test_a_file_of_another_size_is_refused_before_it_is_read(tmp_path):
    handler = link([])
    with served(tmp_path, handler) as url, pytest.raises(DownloadError, match="a file of"):
        fetch(HttpTransport(url), "a", length=10, part=tmp_path / "p", disk=Disk())
    assert not (tmp_path / "p").exists()


def test_a_server_that_drips_is_given_up(tmp_path, monkeypatch):
    from lrcompress.edge import fetch as module
    from lrcompress.edge import transport as pace
    from lrcompress.edge.transport import Body, Traffic

    clock = iter(range(0, 100_000, 10))
    monkeypatch.setattr(pace.time, "monotonic", lambda: next(clock))

    class Drip:
        traffic = Traffic()
        opened = 0

        def get(self, path, start=0):
            Drip.opened += 1
            return Body(start, 10**6, pace.paced(iter([b"x"] * 8), path, None, lambda s: None))

    with pytest.raises(DownloadError):
        fetch(Drip(), "a", length=10**6, part=tmp_path / "p", disk=Disk(), sleep=lambda s: None)
    assert Drip.opened <= module.MAX_TRIES + 10**6 // module.BYTES_PER_TRY


def test_folders_and_file_urls(transport, tmp_path):
    (tmp_path / "www" / "a b").write_bytes(b"0123456789")
    for other in (transport, open_transport((tmp_path / "www").as_uri()), open_transport(str(tmp_path / "www"))):
        assert b"".join(other.get("a b", 4).blocks) == b"456789"
        assert (other.traffic.requests, other.traffic.bytes) == (1, 6)
        for bad in ("nothing", "../secret", "/etc/passwd"):
            with pytest.raises(Unavailable):
                other.get(bad)
    with pytest.raises(Broken):
        FolderTransport(tmp_path / "unplugged").get("a")


def test_a_whole_update_over_http(tmp_path):
    fleet = Fleet(tmp_path)
    fleet.add("first")
    with served(fleet.repo) as url:
        device = Device.init(tmp_path / "d2", made() / "exported", fleet.root, url)
        assert device.update()["state"] == "updated"
    d = device.update()
    assert (d["state"], d["error"]["code"], d["serving"]["kind"]) == ("failed", 8, "payload")


def test_release_of_a_payload_for_a_newer_program_waits(tmp_path):
    fleet = Fleet(tmp_path)
    release(fleet, payload_bytes(), seq=1, min_version="99.0")
    d = fleet.device().update()
    assert (d["state"], d["error"]["code"]) == ("rejected", 6) and "99.0" in d["reason"]
    assert fleet.device().status()["refused"] == []
