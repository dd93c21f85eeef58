"""Bits that flip while nobody looks: in the store, the states, the metadata, the log, the base and the configuration.

A device never serves what was changed. What it can get again it mends by itself; a base or a configuration that rotted
is named, and nothing is served in their place.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from lrcompress.edge.disk import Disk
from lrcompress.errors import DeviceStateError, LrcompressError, ManifestError
from tests.faults.powercut import Image, Recorder, laid_out
from tests.faults.scenes import DEVICE, Scene, World, update


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def rotted(image: Image, path: str, at: int, bit: int) -> Image:
    data = bytearray(image[path] or b"")
    data[at] ^= 1 << bit
    return {**image, path: bytes(data)}


def check(world: World, image: Image, path: str, newest: str, ends: str) -> None:
    """Boot an image in which one file has rotted."""
    import shutil

    name = path.removeprefix(f"{DEVICE}/")
    one = Scene(path, image, newest, update, ends)
    if name.startswith(("store/", "state.", "metadata/", "log")):
        world.judge(one, image, [])
        return
    world.use(newest)
    shutil.rmtree(world.live, ignore_errors=True)
    laid_out(image, world.live, world.pool)
    at = world.live / DEVICE
    if name.startswith("factory/") or name == "config.json":
        with pytest.raises((ManifestError, DeviceStateError)):
            world.open(at, Disk())
        return
    assert name in ("root.json", "device.key", "identity.json")
    device = world.open(at, Recorder(world.live))
    before = device.status()["serving"]
    d = device.update()
    if name != "root.json":  # who it is is no matter of what it serves
        assert d["error"] is None
        return
    assert (d["state"], d["serving"]) == ("failed", before) and d["error"]["code"] in (6, 7)


def places(size: int, most: int, chance: random.Random) -> list[int]:
    """Return the first and last bytes of a file, and one of every region between."""
    ends = {0, size - 1}
    step = max(1, size // max(1, most - 2))
    return sorted(ends | {min(size - 1, i + chance.randrange(step)) for i in range(0, size, step)})


def all_of(world: World, most: int, seed: int) -> int:
    chance, n = random.Random(seed), 0
    for newest, ends in (("r3", world.shas["loha"]), ("r2", world.shas["second"])):
        image = world.folders["2"]
        for path, data in sorted(image.items()):
            if not data:
                continue
            for at in places(len(data), most, chance):
                spoiled = rotted(image, path, at, chance.randrange(8))
                try:
                    check(world, spoiled, path, newest, ends)
                except (AssertionError, LrcompressError) as e:
                    raise AssertionError(f"{path}, byte {at} of {len(data)}: {e}") from e
                n += 1
    return n


def test_rot_in_every_file(world: World) -> None:
    assert all_of(world, most=3, seed=0) > 80


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_rot_in_every_region_of_every_file() -> None:
    world = World()
    try:
        n = all_of(world, most=160, seed=1)
    finally:
        world.close()
    print(f"{n} flipped bits, 0 violations")
    assert n > 4000


@pytest.mark.parametrize(
    "change", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: bytes(len(b)), lambda b: b + b"x"]
)
def test_files_that_lost_all_or_half(world: World, change) -> None:
    image = world.folders["2"]
    for path, data in image.items():
        if data and path.removeprefix(f"{DEVICE}/").startswith(("store/", "state.", "metadata/", "log")):
            check(world, {**image, path: change(data)}, path, "r3", world.shas["loha"])
