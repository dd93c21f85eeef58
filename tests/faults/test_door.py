"""Nothing changes a device's disk but through `lrcompress.edge.disk`: the interpreter itself is the witness."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lrcompress.edge
from tests.faults.powercut import Recorder, taken
from tests.faults.scenes import World, scenes

EDGE = Path(lrcompress.edge.__file__).parent
#: Audit events that change a file system, with the number of the argument that is a path.
CHANGING = {
    "os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "os.symlink": 1, "os.link": 1, "os.truncate": 0, "os.chmod": 0,
    "os.chown": 0, "os.utime": 0, "os.setxattr": 0, "shutil.rmtree": 0, "shutil.move": 1, "shutil.copyfile": 1,
    "tempfile.mkstemp": 0, "tempfile.mkdtemp": 0,
}  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_watched: list[Path] = []
_around: list[str] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _watched or (event != "open" and event not in CHANGING):
        return
    if event == "open":
        path, _, flags = args
        if not isinstance(path, str | bytes | os.PathLike) or not flags & _WRITES:
            return
    else:
        path = args[CHANGING[event]]
    name = os.path.abspath(os.fsdecode(path)) if not isinstance(path, int) else ""  # noqa: PTH100
    frame, door = sys._getframe(1), False
    inside = not any(name.startswith(str(w)) for w in _watched)
    while frame is not None:
        door = door or frame.f_code.co_filename == str(EDGE / "disk.py")
        frame = frame.f_back  # type: ignore[assignment]
    if not door and not inside:
        _around.append(f"{event} {name}")


sys.addaudithook(_hook)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def test_the_witness_sees(tmp_path: Path) -> None:
    _watched.append(tmp_path)
    try:
        (tmp_path / "a").write_text("x")
        (tmp_path / "a").rename(tmp_path / "b")
        (tmp_path / "b").unlink()
        (tmp_path / "c").mkdir()
    finally:
        _watched.clear()
    seen = [e.split()[0] for e in _around]
    _around.clear()
    assert {"open", "os.rename", "os.remove", "os.mkdir"} <= set(seen)


def test_nothing_goes_around_the_door(world: World) -> None:
    """In every scene, first boot to probation: no change below the device's parent without the door in its stack."""
    for one in scenes(world):
        world.use(one.repo)
        _around.clear()
        # The recording lays the folder out first: what that writes is not the device's doing.
        real = World.open

        def opened(self: World, at: Path, disk: Any, real: Any = real, **options: Any) -> Any:
            _watched.append(self.live)
            return real(self, at, disk, **options)

        World.open = opened  # type: ignore[method-assign]
        if one.act is None:
            _watched.append(world.live)
        try:
            disk = world.record(one) if one.act is not None else first_boot(world)
        finally:
            _watched.clear()
            World.open = real  # type: ignore[method-assign]
        assert _around == [], one.name
        assert len(disk.ops) > 5


def first_boot(world: World) -> Recorder:
    _watched.clear()
    import shutil

    shutil.rmtree(world.live, ignore_errors=True)
    world.live.mkdir()
    _watched.append(world.live)
    disk = Recorder(world.live)
    world.init(world.live / "device", disk)
    return disk


def test_what_was_recorded_is_what_is_there(world: World) -> None:
    """The model, fed with the recorded calls, ends with the real folder byte for byte."""
    for one in scenes(world):
        disk = world.record(one)
        list(world.images(one, disk, 1))  # raises where they differ
        assert taken(world.live)


FORBIDDEN = {
    "os": {"rename", "replace", "remove", "unlink", "mkdir", "makedirs", "rmdir", "symlink", "link", "truncate", "fsync", "write", "chmod"},
    "shutil": {"copy", "copyfile", "copytree", "move", "rmtree"},
    "tempfile": {"mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory"},
}  # fmt: skip
METHODS = {"write_bytes", "write_text", "touch", "hardlink_to", "symlink_to"}


@pytest.mark.parametrize("path", sorted(EDGE.glob("*.py")), ids=lambda p: p.name)
def test_no_module_but_the_door_names_a_call_that_writes(path: Path) -> None:
    if path.name == "disk.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        f = node.func
        if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name):
            assert f.attr not in FORBIDDEN.get(f.value.id, ()), f"{path.name}:{node.lineno}"
        if isinstance(f, ast.Attribute):
            assert f.attr not in METHODS, f"{path.name}:{node.lineno}"
        if isinstance(f, ast.Name) and f.id == "open":
            modes = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
            assert modes in ([], ["rb"], ["r"]), f"{path.name}:{node.lineno}"
