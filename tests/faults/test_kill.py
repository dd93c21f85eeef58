"""A device that is stopped before any of its disk calls goes on by itself; so does a publisher. (More beside: see README.md.)"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from lrcompress import publish
from lrcompress.edge import Device
from lrcompress.edge.disk import Disk
from tests.support.fleet import PASSPHRASE, Fleet, answers, made, payload_bytes, release, trial_here

CALLS = ("write", "append", "sync", "sync_folder", "rename", "unlink")


class Stop(BaseException):
    """The process is gone."""


class Counting(Disk):
    """Counts the calls that change the disk; before call `at` it does `what`."""

    def __init__(self, at: int | None = None, what=None, only=CALLS) -> None:
        super().__init__()
        self.calls, self._at, self._what, self._only = 0, at, what, only

    def _before(self, name, path):
        if name in self._only:
            if self.calls == self._at:
                self._what(path)
            self.calls += 1

    def write(self, path, data, mode=0o644):
        self._before("write", path)
        super().write(path, data, mode)

    def append(self, path, data):
        self._before("append", path)
        super().append(path, data)

    def sync(self, path):
        self._before("sync", path)
        super().sync(path)

    def sync_folder(self, path):
        self._before("sync_folder", path)
        super().sync_folder(path)

    def rename(self, source, dest):
        self._before("rename", dest)
        super().rename(source, dest)

    def unlink(self, path):
        self._before("unlink", path)
        super().unlink(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A repository whose newest release is good, and device folders before it; what each payload answers."""
    folder = tmp_path_factory.mktemp("world")
    fleet = Fleet(folder)
    fleet.known = {0: answers(fleet.device())}
    for seq, name in ((1, "first"), (2, "second")):
        fleet.add(name)
        device = fleet.device()
        device.update()
        fleet.known[seq] = answers(device)
    shutil.copytree(fleet.at, folder / "at2", symlinks=True)
    fleet.add("loha")
    device = fleet.device()
    device.update()
    fleet.known[3] = answers(device)
    return fleet


def copy(world, tmp_path):
    at = tmp_path / "d"
    shutil.rmtree(at, ignore_errors=True)
    shutil.copytree(world.folder / "at2", at, symlinks=True)
    return at


def opened(at, **options):
    return Device(at, **{"sleep": lambda s: None, "trial": trial_here(at), **options})


def serving(world, at):
    """Return the seq that a device serves after a restart; its answers must be that release's."""
    device = opened(at)
    seq = device.status()["serving"]["seq"]
    np.testing.assert_array_equal(answers(device), world.known[seq])
    return seq


def converges(world, at, seq=3, boots=3):
    for _ in range(boots):
        opened(at).update()
        if serving(world, at) == seq:
            break
    assert serving(world, at) == seq
    assert opened(at).update()["state"] == "up_to_date"
    assert not list((at / "dl").iterdir()) and len(list((at / "store").iterdir())) <= 2
    assert not list(at.glob("*.tmp"))


def total_calls(world, tmp_path):
    disk = Counting()
    assert opened(copy(world, tmp_path), disk=disk).update()["to_seq"] == 3
    return disk.calls


def test_stopped_before_every_call_it_serves_something_whole_and_converges(world, tmp_path):
    def stop(path):
        raise Stop

    calls = total_calls(world, tmp_path)
    assert calls > 15
    for at_call in range(calls):
        at = copy(world, tmp_path)
        with pytest.raises(Stop):
            opened(at, disk=Counting(at_call, stop)).update()
        assert serving(world, at) in (2, 3), at_call
        converges(world, at)


def test_both_state_copies_destroyed_serves_the_factory_and_deletes_nothing(world, tmp_path):
    at = copy(world, tmp_path)
    for name in ("state.0", "state.1"):
        (at / name).write_bytes(b"")
    stored = set((at / "store").iterdir())
    assert serving(world, at) == 0
    assert not opened(at).status()["state_readable"]
    (at / "device.json").write_text(json.dumps({"schema": 1, "url": f"{world.repo}-gone"}))
    assert opened(at).update()["error"]["code"] == 8
    assert set((at / "store").iterdir()) == stored
    (at / "device.json").unlink()
    converges(world, at)


def test_a_bad_payload_is_refused_wherever_it_is_stopped(tmp_path):
    fleet = Fleet(tmp_path)
    fleet.add("first")
    fleet.device().update()
    before = answers(fleet.device())
    release(fleet, payload_bytes("second", golden={"output": np.ones((8, 5), np.float32)}), seq=2)
    shutil.copytree(fleet.at, tmp_path / "at2", symlinks=True)
    disk = Counting()
    assert fleet.device(disk=disk).update()["state"] == "rejected"

    def stop(path):
        raise Stop

    for at_call in range(disk.calls):
        shutil.rmtree(fleet.at)
        shutil.copytree(tmp_path / "at2", fleet.at, symlinks=True)
        with pytest.raises(Stop):
            fleet.device(disk=Counting(at_call, stop)).update()
        device = fleet.device()
        np.testing.assert_array_equal(answers(device), before)
        device.update()
        np.testing.assert_array_equal(answers(device), before)
        assert [r["seq"] for r in device.status()["refused"]] == [2]
    fleet.add("second")
    assert fleet.device().update()["to_seq"] == 3


def test_a_publisher_that_is_stopped_leaves_a_repository_that_clients_accept(tmp_path, monkeypatch):
    from lrcompress.publish import repository as module

    fleet = Fleet(tmp_path)
    fleet.add("first")
    real, calls = module.write_atomic, [0]
    for at_call in range(4):
        calls[0] = 0

        def stopping(*a, at_call=at_call, **k):
            if calls[0] == at_call:
                raise Stop
            calls[0] += 1
            return real(*a, **k)

        monkeypatch.setattr(module, "write_atomic", stopping)
        with pytest.raises(Stop):
            publish.add(fleet.repo, made() / "adapters" / "second", passphrase=PASSPHRASE)
        monkeypatch.undo()
        assert publish.verify(fleet.repo)["groups"] == [
            {"group": "default", "seq": 1, "bytes": publish.verify(fleet.repo)["groups"][0]["bytes"]}
        ]
        assert fleet.device().update()["to_seq"] == 1
    assert fleet.add("second")["seq"] == 2
    assert fleet.device().update()["to_seq"] == 2
