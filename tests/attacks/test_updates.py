"""What an attacker or a careless publisher may send: none of it is served, and the device goes on with what it has."""

from __future__ import annotations

import json
import struct
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from tuf.api.metadata import Metadata

from lrcompress import publish
from lrcompress.files import sha256_bytes
from lrcompress.publish import repository as repositories
from lrcompress.publish.keys import KeyStore
from lrcompress.publish.repository import Repository
from tests.support.fleet import PASSPHRASE, Fleet, answers, made, payload_bytes, release


@pytest.fixture
def fleet(tmp_path):
    """A fleet whose device serves release 1."""
    fleet = Fleet(tmp_path)
    fleet.add("second")
    fleet.device().update()
    return fleet


def refused(fleet, word, *, code=6, final=None):
    """Update; check that it is refused with `word` in the reason, that nothing changed, and whether that is for good."""
    before = answers(fleet.device())
    device = fleet.device()
    d = device.update()
    assert d["state"] in ("rejected", "failed") and d["error"]["code"] == code, d
    assert word in d["reason"], d["reason"]
    assert (d["serving"]["seq"], d["to_seq"]) == (1, 1)
    np.testing.assert_array_equal(answers(device), before)
    np.testing.assert_array_equal(answers(fleet.device()), before)
    assert not list((fleet.at / "dl").iterdir())
    assert len(list((fleet.at / "store").iterdir())) == 1
    if final is not None:
        assert bool(device.status()["refused"]) == final
    return d


# the transport --------------------------------------------------------------------------------------------------------


def test_a_tampered_payload_is_not_served_and_the_true_one_still_is(fleet):
    sha = fleet.add("first")["sha256"]
    file = fleet.payload(sha)
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    refused(fleet, "as signed", final=False)
    file.write_bytes(good)
    assert fleet.device().update()["to_seq"] == 2


@pytest.mark.parametrize("change", [lambda b: b[:-10], lambda b: b + b"x" * 5000])
def test_another_size_is_not_read(fleet, change):
    file = fleet.payload(fleet.add("first")["sha256"])
    file.write_bytes(change(file.read_bytes()))
    refused(fleet, "a file of", code=8)


def test_a_poisoned_part_of_an_earlier_download_is_thrown_away(fleet):
    added = fleet.add("first")
    part = fleet.at / "dl" / f"{added['sha256']}.part"
    part.write_bytes(b"\0" * 500)
    d = fleet.device().update()
    assert (d["state"], d["to_seq"]) == ("updated", 2)
    part.write_bytes(b"\0" * (added["payload_bytes"] + 100))
    assert fleet.device().update()["state"] == "up_to_date"
    assert not part.exists()


# the metadata ---------------------------------------------------------------------------------------------------------


def files(fleet):
    return {p.name: p.read_bytes() for p in (fleet.repo / "metadata").iterdir()}


def test_old_metadata_are_refused(fleet):
    old = files(fleet)
    fleet.add("first")
    device = fleet.device()
    assert device.update()["to_seq"] == 2
    (fleet.repo / "metadata" / "timestamp.json").write_bytes(old["timestamp.json"])
    d = device.update()
    assert (d["state"], d["to_seq"], d["serving"]["seq"]) == ("rejected", 2, 2)


def test_an_old_release_that_is_signed_anew_is_refused(fleet):
    """python-tuf accepts it: versions grow. Our own seq does not."""
    old = fleet.payload(fleet.device().status()["serving"]["sha256"]).read_bytes()
    fleet.add("first")
    device = fleet.device()
    device.update()
    release(fleet, old, seq=1)
    d = device.update()
    assert (d["state"], d["error"]["code"], d["serving"]["seq"]) == ("rejected", 6, 2)
    release(fleet, old, seq=2)
    d = device.update()
    assert (d["state"], d["serving"]["seq"]) == ("rejected", 2) and "other bytes" in d["reason"]


def test_a_lost_metadata_folder_does_not_let_an_old_release_in(fleet):
    old = files(fleet)
    fleet.add("first")
    fleet.device().update()
    for p in (fleet.at / "metadata").rglob("*"):
        if not p.is_dir():
            p.unlink()
    for name, data in old.items():
        (fleet.repo / "metadata" / name).write_bytes(data)
    d = fleet.device().update()
    assert (d["state"], d["serving"]["seq"]) == ("rejected", 2) and "seq above" in d["reason"]


@pytest.mark.parametrize("name", ["timestamp.json", "snapshot", "default", "targets"])
def test_a_flipped_signature_is_refused(fleet, name):
    fleet.add("first")
    folder = fleet.repo / "metadata"
    path = (
        folder / name
        if name.endswith(".json")
        else max(folder.glob(f"*.{name}.json"), key=lambda p: int(p.name.split(".")[0]))
    )
    value = json.loads(path.read_bytes())
    value["signed"]["expires"] = "2099-01-01T00:00:00Z"
    path.write_text(json.dumps(value))
    if name == "targets":  # not new: the device has it already
        assert fleet.device().update()["to_seq"] == 2
    else:
        refused(fleet, "signed for this device")


def test_a_group_key_signs_for_its_own_group_only(fleet):
    """Whoever steals the key of one group cannot serve another."""
    publish.add(fleet.repo, made() / "adapters" / "first", group="other", passphrase=PASSPHRASE)
    repository = Repository(fleet.repo)
    stolen = KeyStore(repository.keys_folder, PASSPHRASE).load("other")
    forged = repository.read("default")
    forged.signed.version += 1
    forged.sign(stolen)
    forged.to_file(str(repository.metadata / f"{forged.signed.version}.default.json"))
    snapshot, keys = repository.read("snapshot").signed, KeyStore(repository.keys_folder, PASSPHRASE)
    snapshot.meta["default.json"].version = forged.signed.version
    repository.seal(keys, snapshot)
    refused(fleet, "signed for this device")


def test_another_publisher_is_refused(fleet, tmp_path):
    fleet.repo.rename(tmp_path / "true")
    publish.init_repository(fleet.repo, made() / "exported", tmp_path / "keys2", passphrase=PASSPHRASE)
    publish.add(fleet.repo, made() / "adapters" / "first", passphrase=PASSPHRASE)
    refused(fleet, "signed for this device")


def test_expired_metadata_are_refused_until_they_are_refreshed(fleet, monkeypatch):
    monkeypatch.setitem(repositories.EXPIRY, "timestamp", timedelta(seconds=-5))
    fleet.add("first")
    monkeypatch.undo()
    refused(fleet, "expired")
    publish.refresh(fleet.repo, passphrase=PASSPHRASE)
    assert fleet.device().update()["to_seq"] == 2


@pytest.mark.parametrize("hours", [24 * 365 * 30, 24 * 30, 3])
def test_a_clock_in_the_past_is_refused(fleet, hours):
    fleet.options["clock"] = lambda: datetime.now(UTC) - timedelta(hours=hours)
    fleet.add("first")
    refused(fleet, "known to be past", code=10)
    fleet.options["clock"] = lambda: datetime.now(UTC)
    assert fleet.device().update()["to_seq"] == 2


@pytest.mark.parametrize("name", ["timestamp.json", "1.root.json"])
@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[" * 5000, b"\xff" * 100, b'{"signed": {"_type": "root"}, "signatures": []}']
)
def test_rubbish_for_metadata_is_refused(fleet, name, data):
    (fleet.repo / "metadata" / ("timestamp.json" if name == "timestamp.json" else "2.root.json")).write_bytes(data)
    d = fleet.device().update()
    assert d["error"]["code"] == (6 if data else 8) and d["serving"]["seq"] == 1


def test_damaged_metadata_on_the_device_heal(fleet):
    for p in (fleet.at / "metadata").rglob("*.json"):
        p.write_bytes(b"")
    fleet.add("first")
    assert fleet.device().update()["to_seq"] == 2


# the release ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("seq", "2"), ("seq", True), ("seq", -1), ("sha256", "0" * 64), ("sha256", "x"), ("base_ids", []), ("base_ids", "all"),
     ("min_version", 1), ("rollback_of", 7), ("rollback_of", "1"), ("seq", None), ("base_ids", None)],
)  # fmt: skip
def test_a_record_out_of_form_is_refused(fleet, field, value):
    release(fleet, payload_bytes(), **{"seq": 2, field: value})
    refused(fleet, f"release record: {field}", final=False)


def test_a_release_for_another_base_waits_and_is_not_even_loaded(fleet):
    """It is not bad: it is for another device, or something that leads to its base is yet to come."""
    release(fleet, payload_bytes(), seq=2, base_ids=[sha256_bytes(b"another")])
    before = answers(fleet.device())
    d = fleet.device().update()
    assert (d["state"], d["error"], d["to_seq"], d["serving"]["seq"]) == ("pending", None, 1, 1)
    assert d["reason"].startswith("waiting: release seq 2 is for base ") and d["bytes_downloaded"] < len(
        payload_bytes()
    )
    assert fleet.device().status()["refused"] == [] and not list((fleet.at / "dl").iterdir())
    np.testing.assert_array_equal(answers(fleet.device()), before)
    release(fleet, payload_bytes(), seq=3)
    assert fleet.device().update()["to_seq"] == 3


def test_a_payload_beyond_the_limit_is_not_even_loaded(fleet):
    release(fleet, b"\0" * 10, seq=2, length=65 << 20)
    refused(fleet, "device.json", final=False)


# the payload: signed by the true publisher, and wrong -------------------------------------------------------------------

GOOD = payload_bytes


def header_of(data):
    (n,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def joined(header, body):
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + body


def with_nan(data):
    header, body = header_of(data)
    name = next(k for k in header if k not in ("__metadata__",) and not k.startswith("golden/"))
    at = header[name]["data_offsets"][0]
    return joined(header, body[:at] + struct.pack("<f", float("nan")) + body[at + 4 :])


def other_base(data):
    header, body = header_of(data)
    header["__metadata__"]["base_ids"] = json.dumps([sha256_bytes(b"x")])
    return joined(header, body)


def other_slots(data):
    header, body = header_of(data)
    header["__metadata__"]["slots_id"] = sha256_bytes(b"x")
    return joined(header, body)


def without_golden(data):
    header, body = header_of(data)
    name = "golden/output"
    start, end = header.pop(name)["data_offsets"]
    for entry in header.values():
        if "data_offsets" in entry and entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [o - (end - start) for o in entry["data_offsets"]]
    return joined(header, body[:start] + body[end:])


@pytest.mark.parametrize(
    "change",
    [
        with_nan,
        other_base,
        other_slots,
        without_golden,
        lambda d: d[:-4],
        lambda d: d + b"0000",
        lambda d: b"",
        lambda d: b"\xff" * 64,
    ],
)
def test_a_signed_payload_that_breaks_a_rule_is_refused_for_good(fleet, change):
    release(fleet, change(GOOD()) or b"\0", seq=2)
    d = refused(fleet, "payload", final=True)
    assert d["bytes_downloaded"] > 0
    again = fleet.device().update()  # the same bytes are never fetched again
    assert (again["state"], again["error"]["code"]) == ("rejected", 6) and again["bytes_downloaded"] < 600
    fleet.add("first", encoding="f32")
    d = fleet.device().update()
    assert (d["state"], d["to_seq"]) == ("updated", 3)


def test_a_payload_that_does_not_answer_as_its_publisher_saw_is_refused(fleet):
    true = payload_bytes("first")
    from lrcompress.payload import parse

    golden = {k: v + np.float16(0.5) for k, v in parse(true).golden.items()}
    release(fleet, payload_bytes("first", golden=golden), seq=2)
    refused(fleet, "golden output", final=True)


def test_a_payload_that_answers_with_infinity_is_refused(fleet):
    from lrcompress.payload import parse

    golden = dict(parse(payload_bytes("first")).golden)
    release(fleet, payload_bytes("first", golden=golden, change=lambda k, v: v * np.float32(1e30)), seq=2)
    refused(fleet, "finite", final=True)


def test_a_slow_payload_is_refused(fleet, monkeypatch):
    import lrcompress.edge.trial as trial

    run = trial.Session.run_with

    def slow(self, active, inputs, outputs=None):
        if active.payload is not None:
            trial.time.sleep(0.05)
        return run(self, active, inputs, outputs)

    monkeypatch.setattr(trial.Session, "run_with", slow)
    fleet.add("first")
    d = fleet.device().update()
    assert d["state"] == "rejected" and "latency" in d["reason"]


def test_a_full_disk_is_told_before_a_byte_is_moved(fleet):
    from lrcompress.edge.disk import Disk

    class Full(Disk):
        def free_bytes(self, path):
            return 1000

    fleet.add("first")
    before = answers(fleet.device())
    d = fleet.device(disk=Full()).update()
    assert (d["state"], d["error"]["code"]) == ("failed", 10) and "free" in d["reason"]
    np.testing.assert_array_equal(answers(fleet.device()), before)
    assert fleet.device().update()["to_seq"] == 2


def test_the_metadata_that_the_tests_forge_are_what_tuf_reads(fleet):
    assert Metadata.from_file(str(fleet.repo / "metadata" / "timestamp.json")).signed.version == 2
