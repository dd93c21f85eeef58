"""Status records: taken once, in order, from devices that are known; everything else has a status and is counted."""

from __future__ import annotations

import json
import os
import stat
import threading
from datetime import UTC, datetime, timedelta

import pytest
import urllib3

from lrcompress.cli.main import run
from lrcompress.edge import Device
from lrcompress.edge.identity import Identity, new_identity
from lrcompress.errors import CommandError, DeviceStateError, HostError
from lrcompress.publish.collect import Collector
from lrcompress.publish.fleetview import fleet as view
from lrcompress.publish.intake import MAX_RECORD_BYTES, Intake, Refusal
from tests.support.fleet import PASSPHRASE, Fleet, made

NOW = datetime(2026, 12, 1, tzinfo=UTC)
STATUS = {
    "model": "small", "group": "default", "base_id": "ab" * 32, "refused": [],
    "serving": {"kind": "payload", "sha256": "cd" * 32, "seq": 2},
}  # fmt: skip
OUTCOME = {"state": "updated", "reason": "", "bytes_downloaded": 4000, "requests": 5, "ms": 12.5}


def created(folder):
    """Write a new identity as `device init` does."""
    folder.mkdir()
    for name, (data, mode) in new_identity(group="default", channel="stable", report_url=None).items():
        (folder / name).write_bytes(data)
        (folder / name).chmod(mode)
    return Identity(folder)


@pytest.fixture
def identity(tmp_path):
    return created(tmp_path / "device")


@pytest.fixture
def intake(tmp_path, identity):
    found = Intake(tmp_path / "fleet.db")
    found.enroll(tmp_path / "device")
    return found


def body(identity, at=NOW, **options):
    return json.dumps(identity.record(STATUS, OUTCOME, at=at, **options)).encode()


def refused(intake, data, status, kind, **options):
    with pytest.raises(Refusal) as caught:
        intake.take(data, now=NOW, **options)
    assert (caught.value.status, caught.value.kind) == (status, kind) and "\n" not in str(caught.value)


def test_a_record_is_taken_once_and_only_forward(intake, identity):
    first, second = body(identity), body(identity)
    assert intake.take(second, now=NOW)["counter"] == 2
    for old in (first, second):
        refused(intake, old, 409, "replay")
    intake.take(body(identity), now=NOW)
    (device,) = intake.devices()
    assert (device["reports"], device["bytes"], device["requests"], device["counter"]) == (2, 8000, 10, 3)
    assert intake.refusals() == {"replay": 2}


def test_unknown_expelled_and_forged_devices_are_refused(tmp_path, intake, identity):
    other = created(tmp_path / "other")
    refused(intake, body(other), 403, "unknown device")
    value = json.loads(body(other))
    value["record"]["device"] = identity.id  # signed by a key, but not this device's
    refused(intake, json.dumps(value).encode(), 403, "bad signature")
    value = json.loads(body(identity))
    value["record"]["healthy"] = False
    refused(intake, json.dumps(value).encode(), 403, "bad signature")
    intake.expel(identity.id)
    refused(intake, body(identity), 403, "unknown device")
    with pytest.raises(CommandError):
        intake.expel("nobody")
    assert intake.devices() == []
    intake.enroll(tmp_path / "device", channel="canary")  # and back
    assert intake.take(body(identity), now=NOW) and intake.devices()[0]["channel"] == "canary"


def test_the_future_and_another_group_are_refused_and_the_past_is_not(tmp_path, intake, identity):
    refused(intake, body(identity, NOW + timedelta(minutes=11)), 422, "from the future")
    intake.take(body(identity, NOW + timedelta(minutes=9)), now=NOW)
    intake.take(body(identity, NOW - timedelta(days=400)), now=NOW)
    intake.enroll(tmp_path / "device", group="kitchen")
    refused(intake, body(identity), 422, "another group")


def test_what_has_another_form_is_refused(intake, identity):
    good = json.loads(body(identity))
    bad = [b"", b"{", b"[]", b"\xff\xfe", b"[" * 9000, b'{"record": 1, "signature": 2}', b"x" * (MAX_RECORD_BYTES + 1)]
    for field, value in [
        ("counter", -1), ("counter", True), ("counter", 1 << 70), ("at", "yesterday"), ("at", "2026-12-01T00:00:00"), ("bytes", 1.5),
        ("serving", []), ("serving", {"sha256": "../x"}), ("refused", [1]), ("refused", [{"sha256": 5}]), ("healthy", 1), ("schema", 2),
        ("reason", "x" * 500), ("state", 4), ("device", None), ("reason", "\ud800"), ("serving", {"sha256": None, "seq": "1"}),
    ]:  # fmt: skip
        bad.append(json.dumps({**good, "record": {**good["record"], field: value}}).encode())
    bad.append(json.dumps({**good, "signature": "00"}).encode())
    bad.append(json.dumps({**good, "record": {**good["record"], "more": 1}}).encode())
    bad.append(body(identity).replace(b'"counter"', b'"counter": 9, "counter"'))
    bad.append(body(identity) + b" " * MAX_RECORD_BYTES)
    for data in bad:
        with pytest.raises(Refusal) as caught:
            intake.take(data, now=NOW)
        assert caught.value.status == (413 if len(data) > MAX_RECORD_BYTES else 400), data[:200]
    assert sum(intake.refusals().values()) == len(bad)


def test_two_records_at_once_count_once(intake, identity):
    data, taken = body(identity), []

    def send():
        try:
            intake.take(data, now=NOW)
            taken.append(1)
        except Refusal:
            pass

    threads = [threading.Thread(target=send) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(taken) == 1 and intake.devices()[0]["reports"] == 1


def test_an_identity_is_private_stays_and_never_counts_twice(tmp_path, identity):
    assert stat.S_IMODE((tmp_path / "device" / "device.key").stat().st_mode) == 0o600
    assert Identity.find(tmp_path) is None and Identity(tmp_path / "device").id == identity.id
    for wrong in ({"channel": "x"}, {"report_url": "ftp://x"}):
        with pytest.raises(CommandError):
            new_identity(**{"group": "default", "channel": "stable", "report_url": None, **wrong})
    assert [identity.record(STATUS)["record"]["counter"] for _ in range(3)] == [1, 2, 3]
    (tmp_path / "device" / "report.counter").write_bytes(b"rot")
    assert identity.record(STATUS)["record"]["counter"] > 10**9
    assert identity.report(STATUS) is False  # nowhere to send it
    about = json.loads((tmp_path / "device" / "identity.json").read_text())
    (tmp_path / "device" / "identity.json").write_text(json.dumps({**about, "id": "0" * 32}))
    with pytest.raises(DeviceStateError):
        Identity(tmp_path / "device")


def test_only_an_identity_is_enrolled(tmp_path, intake, identity):
    about = json.loads((tmp_path / "device" / "identity.json").read_text())
    for wrong in ({"id": "0" * 32}, {"public": "zz"}, {"group": "../x"}, {"channel": "beta"}):
        with pytest.raises(CommandError):
            intake.enroll({**about, **wrong})
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CommandError):
            intake.enroll(path)
    (tmp_path / "no.db").write_bytes(b"not a database" * 100)
    with pytest.raises(DeviceStateError):
        Intake(tmp_path / "no.db")
    with pytest.raises(HostError):
        Intake(tmp_path / "nowhere" / "x.db")


def test_over_http_with_every_status(tmp_path, intake, identity):
    server = Collector(intake, "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        sender = Identity(tmp_path / "device")
        sender.report_url = f"{url}/status"
        assert sender.report(STATUS, OUTCOME) and sender.report(STATUS, OUTCOME, healthy=False, reason="blurred")

        def post(data, **headers):
            return urllib3.request("POST", url, body=data, headers=headers, retries=False)

        old = json.dumps(sender.record(STATUS)).encode()
        assert sender.report(STATUS) and post(old).status == 409
        assert post(b"{}").status == 400 and post(b"x" * (MAX_RECORD_BYTES + 1)).status == 413
        ahead = json.dumps(sender.record(STATUS, at=datetime.now(UTC) + timedelta(days=1))).encode()
        answer = post(ahead)
        assert answer.status == 422 and b"clock" in answer.data
        assert urllib3.request("GET", f"{url}/healthz").status == 200
        assert urllib3.request("GET", f"{url}/etc/passwd").status == 404
        intake.path.chmod(0o444)
        if os.geteuid():
            assert post(json.dumps(sender.record(STATUS)).encode()).status == 503
    finally:
        server.shutdown()
        server.server_close()
    assert not sender.report(STATUS)  # nobody there: no exception
    (device,) = intake.devices()
    assert device["failures"] == 1 and device["reports"] == 3


def test_the_view_and_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LRCOMPRESS_KEY_PASSPHRASE", PASSPHRASE)
    fleet = Fleet(tmp_path / "f")
    Device.init(fleet.folder / "canary", made() / "exported", fleet.root, str(fleet.repo), channel="canary")
    fleet.at = fleet.folder / "canary"
    identity = Identity(fleet.at)
    first = fleet.add("first")
    new = fleet.add("second", channel="canary")
    repo = str(fleet.repo)
    assert run(["publish", "enroll", repo, str(fleet.at), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["enrolled"][0]["channel"] == "canary"
    device = fleet.device()
    outcome = device.update()
    assert outcome["serving"]["sha256"] == new["sha256"]
    intake = Intake(tmp_path / "f" / "repo.fleet.db")
    for healthy, reason in ((True, ""), (False, "<b>blurred</b>")):
        intake.take(json.dumps(identity.record(device.status(), outcome, healthy=healthy, reason=reason)).encode())
    page = tmp_path / "fleet.html"
    d = view(fleet.repo, intake, html=page)
    (group,) = d["groups"]
    assert group["stable"]["sha256"] == first["sha256"] and group["serving"] == [
        {"seq": 2, "sha256": new["sha256"], "base_id": device.manifest.base_id, "devices": 1}
    ]
    assert group["rollout"] == {"seq": 2, "sha256": new["sha256"], "percent": 0, "eligible": 1, "well": 0, "failed": 1}
    assert group["bytes"] == 2 * outcome["bytes_downloaded"] and group["failing"][0]["device"] == identity.id
    text = page.read_text()
    assert (
        "&lt;b&gt;blurred" in text and "<b>blurred" not in text and "Rollout of seq 2" in text and "<script" not in text
    )
    assert run(["publish", "fleet", repo, "--html", str(page)]) == 0
    assert "1 failing" in capsys.readouterr().out
    assert run(["publish", "rollout", repo, "--auto", "--min-reports", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decision"] == "halt"
    assert run(["publish", "enroll", repo, "--remove", identity.id]) == 0
    for bad in (["enroll", repo], ["enroll", repo, "--remove", "x"], ["fleet", repo, "--db", f"{repo}/x.db"]):
        assert run(["publish", *bad]) == 2
    busy = Collector(intake, "127.0.0.1", 0)
    assert run(["publish", "collect", repo, "--port", str(busy.server_port)]) == 10
    busy.server_close()
