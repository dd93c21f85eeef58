"""Time: the last trusted one is kept, an earlier clock is refused, expiry stops updates and never serving, and 400 days
away have a way back."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from lrcompress import publish
from lrcompress.errors import UpdateError
from lrcompress.publish import releases, repository, upkeep
from lrcompress.publish.repository import Repository
from tests.support.fleet import PASSPHRASE, Fleet, answers

START = datetime.now(UTC).replace(microsecond=0)


class Time:
    """The publisher's clock and the device's."""

    def __init__(self, fleet: Fleet, patch: pytest.MonkeyPatch) -> None:
        self.there = self.here = START
        for module in (repository, upkeep, releases):
            patch.setattr(module, "now", lambda: self.there)
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


def refused_then_set_right(fleet: Fleet, clock: Time, wrong: datetime) -> None:
    """A clock that lost its battery stops updates with its remedy, and serving never."""
    before, now, clock.here = answers(fleet.device()), clock.here, wrong
    device = fleet.device()
    np.testing.assert_array_equal(answers(device), before)
    d = device.update()
    assert (d["state"], d["error"]["code"], d["error"]["remedy"]) == ("failed", 10, "set this device's clock")
    clock.here = now


def test_four_hundred_days_away(fleet: Fleet, clock: Time) -> None:
    """In a drawer while its publisher went on: releases, roots and signatures came and went, old ones were pruned.

    Switched on, it serves; with its clock set, one update brings it to the newest release, whatever it missed.
    """
    before, drawer = answers(fleet.device()), clock.here
    for day in range(0, 400, 10):  # cron
        clock.passes(days=10)
        if day in (100, 390):
            fleet.add("second" if day == 390 else "loha")
        publish.refresh(fleet.repo, passphrase=PASSPHRASE)
    publish.prune(fleet.repo, keep=1)
    assert Repository(fleet.repo).roots() == [1, 2, 3]
    refused_then_set_right(fleet, clock, datetime(1970, 1, 3, tzinfo=UTC))
    refused_then_set_right(fleet, clock, drawer)  # a clock that stood still: what it is shown is of its future
    np.testing.assert_array_equal(answers(fleet.device()), before)
    d = fleet.device().update()
    assert (d["state"], d["from_seq"], d["to_seq"]) == ("updated", 1, 3)
    assert fleet.device().status()["last_trusted_time"] == clock.there.isoformat()
    assert sorted(p.name for p in (fleet.at / "metadata" / "root_history").iterdir()) == ["2.root.json", "3.root.json"]
    assert fleet.device().update()["state"] == "up_to_date"


def test_four_hundred_days_away_of_both(fleet: Fleet, clock: Time) -> None:
    """The publisher slept, too, and every signature of it expired: one `publish refresh` brings the whole fleet back."""
    before = answers(fleet.device())
    clock.passes(days=400)
    d = fleet.device().update()
    assert (d["state"], d["error"]["code"], d["serving"]["seq"]) == ("rejected", 6, 1) and "expired" in d["reason"]
    assert "publish refresh" in d["error"]["remedy"]
    np.testing.assert_array_equal(answers(fleet.device()), before)
    with pytest.raises(UpdateError, match="publish refresh"):  # a release alone would bring nobody back
        fleet.add("second")
    d = publish.refresh(fleet.repo, passphrase=PASSPHRASE)
    assert d["renewed"] == ["root", "targets", "default", "snapshot", "timestamp"] and not d["keys_missing"]
    refused_then_set_right(fleet, clock, datetime(1970, 1, 3, tzinfo=UTC))
    d = fleet.device().update()
    assert (d["state"], d["serving"]["seq"]) == ("up_to_date", 1)
    fleet.add("second")
    assert fleet.device().update()["to_seq"] == 2


def test_four_hundred_days_and_other_keys(fleet: Fleet, clock: Time) -> None:
    """Every key of the publisher was replaced meanwhile, the root's own among them: the chain of roots leads there."""
    for role in ("root", "timestamp", "targets", "root"):
        clock.passes(days=100)
        publish.refresh(fleet.repo, passphrase=PASSPHRASE)
        publish.rotate_keys(fleet.repo, [role], passphrase=PASSPHRASE)
    fleet.add("second")
    d = fleet.device().update()
    assert (d["state"], d["to_seq"]) == ("updated", 2)


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
