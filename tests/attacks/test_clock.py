"""Time: the last trusted one is kept, an earlier clock is refused, expiry stops updates and never serving, and 400 days
away have a way back."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from tuf.api.metadata import MetaFile

from lrcompress import publish
from lrcompress.publish import repository as publisher
from lrcompress.publish.keys import KeyStore
from lrcompress.publish.repository import Repository, put_metadata
from tests.support.fleet import PASSPHRASE, Fleet, answers

START = datetime.now(UTC).replace(microsecond=0)


class Time:
    """The publisher's clock and the device's."""

    def __init__(self, fleet: Fleet, patch: pytest.MonkeyPatch) -> None:
        self.there = self.here = START
        patch.setattr(publisher, "now", lambda: self.there)
        fleet.options["clock"] = lambda: self.here

    def passes(self, **length: float) -> None:
        self.there += timedelta(**length)
        self.here += timedelta(**length)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


@pytest.fixture
def clock(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> Iterator[Time]:
    time = Time(fleet, monkeypatch)
    fleet.add("first")
    assert fleet.device().update()["to_seq"] == 1
    yield time


def signed_anew(fleet: Fleet, *roles: str) -> None:
    """Sign the next version of roles with the keys that they have."""
    repository = Repository(fleet.repo)
    keys, snapshot = KeyStore(repository.keys_folder, PASSPHRASE), repository.read("snapshot").signed
    for role in roles:
        signed = repository.read(role).signed
        signed.version += 1
        put_metadata(repository.metadata, role, signed, [keys.load(role)], repository.lifetime(role))
        if role != "root":
            snapshot.meta[f"{role}.json"] = MetaFile(version=signed.version)
    repository.seal(keys, snapshot)


def test_four_hundred_days_away(fleet: Fleet, clock: Time) -> None:
    """Off in a drawer while releases, roots and signatures came and went: switched on, it serves; with its clock set, it updates.

    Where the publisher, too, had gone to sleep, a new root and new signatures bring the whole fleet back.
    """
    before = answers(fleet.device())
    clock.passes(days=400)
    d = fleet.device().update()
    assert (d["state"], d["error"]["code"], d["serving"]["seq"]) == ("rejected", 6, 1) and "expired" in d["reason"]
    assert "publish refresh" in d["error"]["remedy"]
    np.testing.assert_array_equal(answers(fleet.device()), before)
    signed_anew(fleet, "root")
    signed_anew(fleet, "root", "targets")
    fleet.add("second")
    now = clock.here
    clock.here = datetime(1970, 1, 3, tzinfo=UTC)  # no battery
    device = fleet.device()
    np.testing.assert_array_equal(answers(device), before)
    d = device.update()
    assert (d["state"], d["error"]["code"], d["error"]["remedy"]) == ("failed", 10, "set this device's clock")
    clock.here = now
    d = fleet.device().update()
    assert (d["state"], d["to_seq"]) == ("updated", 2)
    assert fleet.device().status()["last_trusted_time"] == clock.there.isoformat()
    assert sorted(p.name for p in (fleet.at / "metadata" / "root_history").iterdir()) == ["2.root.json", "3.root.json"]


def test_the_trusted_time_only_grows_and_survives(fleet: Fleet, clock: Time) -> None:
    assert fleet.device().status()["last_trusted_time"] == START.isoformat()
    clock.passes(days=3)
    publish.refresh(fleet.repo, passphrase=PASSPHRASE)
    assert fleet.device().update()["state"] == "up_to_date"
    assert fleet.device().status()["last_trusted_time"] == (START + timedelta(days=3)).isoformat()
    clock.here = START + timedelta(days=2)
    d = fleet.device().update()
    assert (d["state"], d["error"]["code"]) == ("failed", 10) and "known to be past" in d["reason"]
    clock.here = START + timedelta(days=3) - timedelta(minutes=50)  # clocks differ by as much
    assert fleet.device().update()["state"] == "up_to_date"


def test_a_clock_set_back_does_not_bring_old_metadata_back(fleet: Fleet, clock: Time) -> None:
    """Old signatures are valid for an old clock, and a device that lost its metadata knows no newer version of them."""
    old = {p: p.read_bytes() for p in (fleet.repo / "metadata").iterdir()}
    clock.passes(days=3)
    publish.refresh(fleet.repo, passphrase=PASSPHRASE)
    fleet.device().update()
    for p in (fleet.at / "metadata").rglob("*.json"):
        p.unlink()
    for p, data in old.items():
        p.write_bytes(data)
    clock.here = START + timedelta(days=1)
    d = fleet.device().update()
    assert (d["state"], d["error"]["code"]) == ("failed", 10) and "known to be past" in d["reason"]
    clock.here = START + timedelta(days=3)
    assert fleet.device().update()["state"] == "up_to_date"


def test_an_idle_poll_writes_nothing(fleet: Fleet, clock: Time) -> None:
    fleet.device().update()
    for _ in range(3):
        d = fleet.device().update()
        assert (d["state"], d["bytes_written"], d["requests"]) == ("up_to_date", 0, 2)


@pytest.mark.parametrize("days", [1, 100])
def test_a_time_ahead_of_this_clock_is_never_kept(fleet: Fleet, clock: Time, days: int) -> None:
    """One release signed in the future would lock the device out of every update until then."""
    here = clock.there
    clock.there += timedelta(days=days)
    fleet.add("second")
    d = fleet.device().update()
    assert (d["state"], d["error"]["code"], d["error"]["remedy"]) == ("failed", 10, "set this device's clock")
    assert fleet.device().status()["last_trusted_time"] == START.isoformat()
    clock.there = here
    fleet.add("loha")
    assert fleet.device().update()["to_seq"] == 3


def test_a_clock_ahead_stops_updates_and_nothing_else(fleet: Fleet, clock: Time) -> None:
    fleet.add("second")
    clock.here += timedelta(days=3650)
    before = answers(fleet.device())
    d = fleet.device().update()
    assert (d["state"], d["serving"]["seq"]) == ("rejected", 1) and "expired" in d["reason"]
    np.testing.assert_array_equal(answers(fleet.device()), before)
    clock.here = clock.there
    assert fleet.device().update()["to_seq"] == 2
