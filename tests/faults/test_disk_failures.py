"""A disk that is full, broken or read-only at any call, once or from then on: told in one line, survived, mended."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lrcompress.edge import Device
from lrcompress.edge import disk as door
from lrcompress.errors import HostError
from tests.faults.powercut import Op, Recorder, taken
from tests.faults.scenes import Scene, World, scenes
from tests.faults.test_powercut import scene

#: What `Device.update` returns.
Outcome = dict[str, Any]

NUMBERS = {
    "full": errno.ENOSPC,
    "broken": errno.EIO,
    "read-only": errno.EROFS,
    "over its quota": errno.EDQUOT,
    "forbidden": errno.EACCES,
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def acted(world: World, one: Scene, before: Callable[[int, Op], None] | None = None) -> tuple[Recorder, list[Outcome]]:
    """Act a scene; return what it did, and what every update in it said. A rollback or a report may say `HostError`."""
    said: list[Outcome] = []
    update = Device.update

    def told(self: Device) -> Outcome:
        said.append(update(self))
        return said[-1]

    def act(device: Device) -> None:
        assert one.act is not None
        with contextlib.suppress(HostError):
            one.act(device)

    Device.update = told  # type: ignore[method-assign]
    try:
        return world.record(replace(one, act=act), before=before), said
    finally:
        Device.update = update  # type: ignore[method-assign]


def fails(world: World, name: str, number: int, lasting: bool, every: int) -> int:
    """Let each `every`th call of a scene fail; see that the device serves, says so, and converges on a good disk."""
    one, tried = scene(world, name), 0
    whole, usual = acted(world, one)
    good = {d["state"] for d in usual} | {"updated", "up_to_date", "rejected", "rolled_back"}
    for at in range(0, len(whole.ops), every):
        calls = itertools.count()

        def before(_: int, op: Op, at: int = at, calls: Iterator[int] = calls) -> None:
            i = next(calls)
            if i == at or (lasting and i > at):
                with door._told(Path(op.path)):
                    raise OSError(number, os.strerror(number), op.path)

        disk, said = acted(world, one, before)
        for d in said:
            if d["state"] == "failed" and "failed" not in {u["state"] for u in usual}:
                assert d["error"]["code"] == 10 and os.strerror(number) in d["reason"], d
            assert d["state"] in good | {"failed"}, d
        # What was fetched is given up where the disk fails: it would stand in the way of whatever needs the room.
        world.judge(one, taken(world.live), [what for _, what in disk.marks if not isinstance(what, tuple)])
        tried += 1
    return tried


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("kind", ["full", "broken", "read-only"])
def test_a_disk_that_fails(world: World, kind: str, lasting: bool) -> None:
    assert fails(world, "third update, the oldest goes", NUMBERS[kind], lasting, every=2) > 10


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("kind", NUMBERS)
def test_a_disk_that_fails_anywhere(kind: str, lasting: bool) -> None:
    world = World()
    try:
        n = sum(fails(world, one.name, NUMBERS[kind], lasting, every=1) for one in scenes(world) if one.act is not None)
    finally:
        world.close()
    print(f"{kind}, {'from then on' if lasting else 'once'}: {n} failures, 0 violations")
    assert n > 300


def test_a_download_that_could_not_be_synced_is_not_believed_later(world: World) -> None:
    """After a failed sync the pages count as clean: the next sync succeeds, and the disk may hold anything."""
    one = scene(world, "second update")

    def before(i: int, op: Op) -> None:
        if op.name == "sync" and op.path.endswith(".part"):
            with door._told(Path(op.path)):
                raise OSError(errno.EIO, "Input/output error", op.path)

    world.record(one, before=before)
    assert list((world.live / "device" / "dl").iterdir()) == []


def test_nothing_is_deleted_while_both_copies_of_the_state_are_lost(world: World) -> None:
    """Not by a poll without a network, nor by one that finds the release that is stored already."""
    image = {**world.folders["2"], "device/state.0": b"rot", "device/state.1": b"rot"}
    stored = {p for p in image if p.startswith("device/store/")}
    for repo in ("none", "bad", "r2"):
        one = Scene("lost", image, repo, lambda device: device.update(), None)
        disk = world.record(one)
        gone = {op.path for op in disk.ops[: next((i for i, op in enumerate(disk.ops) if op.dest.startswith("device/state.")), len(disk.ops))] if op.name == "unlink"}  # fmt: skip
        assert not gone & stored, repo
    assert world.open(world.live / "device", Recorder(world.live)).status()["serving"]["seq"] == 2


def test_a_first_boot_on_a_failing_disk_leaves_nothing(world: World) -> None:
    one = scene(world, "first boot")
    for at in range(0, len(world.record(one).ops), 3):
        shutil.rmtree(world.live)
        world.live.mkdir()
        left = [at]

        def before(i: int, op: Op, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                with door._told(Path(op.path)):
                    raise OSError(errno.ENOSPC, "No space left on device", op.path)

        with pytest.raises(HostError):
            world.init(world.live / "device", Recorder(world.live, before=before))
        there = {p.name for p in world.live.iterdir()}
        assert there in (set(), {"device"})  # the last sync of the parent may fail when all is in place
        if there:
            world.open(world.live / "device", Recorder(world.live)).status()
