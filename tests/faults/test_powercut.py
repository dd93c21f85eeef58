"""The power goes at every call to the disk of everything that a device does: it serves, remembers and converges.

`make test` takes a few images of each call, `make faults` all that a strict file system allows (see `powercut`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.faults.powercut import Recorder
from tests.faults.scenes import Scene, Violation, World, killed_at, scenes

NAMES = [
    "first boot", "first update", "second update", "third update, the oldest goes", "a payload that fails its trial",
    "rolled back here", "rolled back by the publisher", "the same bytes, signed again", "a download that goes on",
    "a download that was poisoned", "a link that is cut", "a payload that rotted", "a state copy that rotted",
    "a root that was rotated, and a release", "a log that is full", "no verdict, then one", "a newer release while one waits",
    "a delta", "a delta that is broken", "what C++ loads, for the first time", "what C++ loads, again", "two reports",
    "on probation, and well", "on probation, and ill",
    "a new base", "a third base, the oldest goes", "a new base whose payload fails its trial", "rolled back here from a new base",
    "rolled back from a new base by the publisher", "a link that is cut while a base comes", "a base that rotted",
    "no verdict on a new base, then one", "a new base on probation, and ill",
]  # fmt: skip


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def scene(world: World, name: str) -> Scene:
    return next(s for s in scenes(world) if s.name == name)


def cut(world: World, one: Scene, disk: Recorder, most: int, sample: int | None = None, seed: int = 0) -> int:
    """Judge the images of a recording (a sample of them, if given); return how many. Raises with the call and the image."""
    images = list(world.images(one, disk, most, seed))
    if sample is not None and len(images) > sample:
        images = random.Random(seed).sample(images, sample)
    for call, image, promised in images:
        try:
            world.judge(one, image, promised)
        except Exception as e:
            at = "after the last call" if call == len(disk.ops) else f"before call {call}, {disk.ops[call]}"
            raise Violation(f"{one.name}: the power went {at}: {type(e).__name__}: {e}") from e
    return len(images)


def test_every_scene_is_listed(world: World) -> None:
    assert [s.name for s in scenes(world)] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_power_cut(world: World, name: str) -> None:
    one = scene(world, name)
    # A new base takes the same calls as a payload and many more: a few images of them, and all in the long run.
    assert cut(world, one, world.record(one), most=6, sample=15 if "base" in name else 40) >= 12


@pytest.mark.parametrize("call", [6, 14, 22, 28])
def test_a_kill_then_a_power_cut(world: World, call: int) -> None:
    """What a killed process left in the page cache is believed by the next one; the cut then takes it away."""
    one = scene(world, "third update, the oldest goes")
    assert cut(world, one, killed_at(world, one, call), most=4, sample=20, seed=call) > 10


def test_a_base_that_a_killed_process_deleted_does_not_come_back_as_a_third(world: World) -> None:
    """The next process sees nothing to delete any more; what is gone for it may come back beside what it puts there."""
    one, judged, asker = scene(world, "a third base, the oldest goes"), 0, "Bases.admit"
    first = next(i for i, op in enumerate(world.record(one).ops) if op.by == asker and op.name == "sync_folder")
    disk = killed_at(world, one, first)
    for call, image, promised in list(world.images(one, disk, 64)):
        if call < len(disk.ops) and disk.ops[call].by == asker and call > first:
            world.judge(one, image, promised)
            judged += 1
    assert judged > 4


def test_what_a_killed_process_deleted_does_not_come_back_as_a_third(world: World) -> None:
    """The oldest payload was deleted, and the process killed before it could make that last; the next one goes on."""
    one, tried = scene(world, "third update, the oldest goes"), 0
    ops = world.record(one).ops
    call = next(i for i, op in enumerate(ops) if op.name == "unlink" and "/store/" in op.path) + 1
    disk = killed_at(world, one, call)
    for at, image, promised in list(world.images(one, disk, 24)):
        if at > call:
            world.judge(one, image, promised)
            tried += 1
    assert tried > 20


def test_what_a_killed_process_emitted_is_made_to_last(world: World) -> None:
    """Killed before it could sync the names in emit/: the next process finds all as it should be, and builds on it."""
    one, tried = scene(world, "what C++ loads, again"), 0
    calls = [i for i, op in enumerate(world.record(one).ops) if op.name == "sync_folder" and op.path.endswith("/emit")]
    for call in calls:
        disk = killed_at(world, one, call)
        for at, image, promised in list(world.images(one, disk, 16)):
            if at >= call:
                world.judge(one, image, promised)
                tried += 1
    assert len(calls) >= 3 and tried > 40


def test_a_second_cut_while_it_recovers(world: World) -> None:
    one = scene(world, "third update, the oldest goes")
    assert twice(world, one, first=8, second=6, seed=0) > 20


def twice(world: World, one: Scene, first: int, second: int, seed: int) -> int:
    """Cut the power, boot, cut it again at any call of the recovery; return how many second images were judged."""
    disk, count = world.record(one), 0
    chosen = random.Random(seed).sample(list(world.images(one, disk, 8, seed)), first)
    for at, (_, image, promised) in enumerate(chosen):
        if f"{'device'}/config.json" not in image:
            continue
        again = Scene(
            f"{one.name}, cut once", image, one.repo, lambda d: d.update(), one.ends, one.said, one.refused, one.options
        )
        recovery = world.record(again)
        for what in promised:
            recovery.marks.insert(0, (0, what))
        count += cut(world, again, recovery, most=4, sample=second, seed=at)
    return count


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_thousand_images() -> None:
    """All of it: every call of every scene, kills before it, second cuts. Prints how many distinct images were booted."""
    world, total = World(), 0
    try:
        for one in scenes(world):
            disk = world.record(one)
            n = cut(world, one, disk, most=96)
            print(f"{one.name:36} {len(disk.ops):4} calls {n:6} images", flush=True)
            total += n
        for name in (
            "second update",
            "third update, the oldest goes",
            "a payload that fails its trial",
            "on probation, and ill",
            "a new base",
            "a third base, the oldest goes",
            "a new base on probation, and ill",
            "a delta",
            "what C++ loads, again",
        ):
            one, n = scene(world, name), 0
            for call in range(len(world.record(one).ops)):
                n += cut(world, one, killed_at(world, one, call), most=24, sample=30, seed=call)
            print(f"{name + ', killed before':36} {n:17} images", flush=True)
            m = twice(world, one, first=60, second=40, seed=7)
            print(f"{name + ', cut twice':36} {m:17} images", flush=True)
            total += n + m
    finally:
        world.close()
    print(f"{total} images, 0 violations", flush=True)
    assert total >= 10_000
