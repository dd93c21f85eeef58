"""What may be left on a disk when the power goes: a file system that keeps no promise but those of POSIX.

`Recorder` is a `Disk` that does what it is told and writes down every call. `Model` replays the calls and knows, at
each of them, what is durable and what is not:

- the content of a file is durable after `sync` of it; until then a cut may leave the old one, the new one, nothing, the
  first half, or zeros of the right length;
- a name is durable after `sync_folder` of the folder around it; until then each change of a name (a creation, an
  `unlink`, a rename within one folder, either end of a rename from one folder to another) may be there or not, in any
  combination. Syncing a file does not make its name durable.

Reading stays on the real disk, so the code under test is the code that ships.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lrcompress.edge.disk import Disk

CHANGES = ("write", "append", "sync", "sync_folder", "rename", "unlink", "mkdir", "rmdir")
#: A disk image: bytes of every file by path, None for folders.
Image = dict[str, bytes | None]


@dataclass(frozen=True)
class Op:
    """One call that changes the disk. Paths are relative to the recorded root; `by` is the function that asked."""

    name: str
    path: str
    by: str
    data: bytes = b""
    dest: str = ""

    def __str__(self) -> str:
        return f"{self.by}: {self.name} {self.path}" + (f" to {self.dest}" if self.dest else "")


class Stop(BaseException):
    """The process is gone."""


class Recorder(Disk):
    """A real disk that writes down what is done to it below `root`.

    `before(i, op)` is called before each call and may raise; `drop(op)` tells which calls are left out, as if a
    programmer had forgotten them: a dropped rename becomes a copy, what is dropped otherwise does not happen.
    """

    def __init__(
        self,
        root: Path,
        *,
        before: Callable[[int, Op], None] | None = None,
        drop: Callable[[Op], bool] | None = None,
        free: int = 1 << 40,
    ) -> None:
        super().__init__()
        self.root, self.ops, self.marks = root, list[Op](), list[tuple[int, object]]()
        self._before, self._drop, self._free = before, drop, free

    def mark(self, what: object) -> None:
        """Note that `what` was promised to somebody after the calls so far."""
        self.marks.append((len(self.ops), what))

    def _log(self, name: str, path: Path, data: bytes = b"", dest: Path | None = None) -> bool:
        """Write a call down; return whether it is to happen."""
        op = Op(name, self._relative(path), _asker(), data, "" if dest is None else self._relative(dest))
        if self._drop is not None and self._drop(op):
            return False
        if self._before is not None:
            self._before(len(self.ops), op)
        self.ops.append(op)
        return True

    def _relative(self, path: Path) -> str:
        return Path(os.path.abspath(path)).relative_to(self.root).as_posix()  # noqa: PTH100

    def write(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        if self._log("write", path, bytes(data)):
            super().write(path, data, mode)

    def append(self, path: Path, data: bytes) -> None:
        if self._log("append", path, bytes(data)):
            super().append(path, data)

    def sync(self, path: Path) -> None:
        if self._log("sync", path):
            self.tally.fsyncs += 1

    def sync_folder(self, path: Path) -> None:
        if self._log("sync_folder", path):
            self.tally.fsyncs += 1

    def rename(self, source: Path, dest: Path) -> None:
        if self._log("rename", source, dest=dest):
            super().rename(source, dest)
        else:
            self._copy(source, dest)

    def _copy(self, source: Path, dest: Path) -> None:
        if source.is_dir():
            self.mkdir(dest)
            for path in sorted(source.iterdir()):
                self._copy(path, dest / path.name)
            self.rmdir(source)
        else:
            self.write(dest, source.read_bytes())
            self.unlink(source)

    def unlink(self, path: Path) -> None:
        if os.path.lexists(path) and self._log("unlink", path):
            super().unlink(path)

    def mkdir(self, path: Path, mode: int = 0o755) -> None:
        if self._log("mkdir", path):
            super().mkdir(path, mode)

    def rmdir(self, path: Path) -> None:
        if self._log("rmdir", path):
            super().rmdir(path)

    def free_bytes(self, path: Path) -> int:
        return self._free


def _asker() -> str:
    """Return the function that asked the disk for something."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.endswith(("edge/disk.py", "faults/powercut.py")):
        frame = frame.f_back  # type: ignore[assignment]
    return frame.f_code.co_qualname


# the model ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _File:
    durable: bytes | None
    now: bytes
    #: Whether it was cut to nothing since it was synced; otherwise what was durable stays whatever is appended.
    rewritten: bool = False

    def contents(self) -> list[bytes]:
        """Return what a cut may leave of it, what was durable first."""
        if self.durable == self.now:
            return [self.now]
        old, new = self.durable or b"", self.now
        kept = b"" if self.rewritten else old
        added = len(new) - len(kept)
        found = [old, new, kept, new[: len(kept) + added // 2], kept + bytes(added)]
        return list(dict.fromkeys(found))


@dataclass(eq=False)
class _Folder:
    """Names now, names that are durable, and the changes since, each of which may have reached the disk or not."""

    now: dict[str, int] = field(default_factory=dict)
    durable: dict[str, int] = field(default_factory=dict)
    events: list[dict[str, int | None]] = field(default_factory=list)

    def put(self, changes: dict[str, int | None]) -> None:
        self.events.append(changes)
        _apply(self.now, changes)

    def sync(self) -> None:
        self.durable, self.events = dict(self.now), []


def _apply(names: dict[str, int], changes: dict[str, int | None]) -> None:
    for name, inode in changes.items():
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode


class Model:
    """The disk as it may be: starts as `image`, all of it durable; `do` one call after the other."""

    def __init__(self, image: Image) -> None:
        self._inodes: dict[int, _File | _Folder] = {0: _Folder()}
        for path, data in sorted(image.items()):
            folder, name = self._at(path)
            inode = self._new(_Folder() if data is None else _File(data, data))
            folder.now[name] = folder.durable[name] = inode

    def _new(self, what: _File | _Folder) -> int:
        inode = len(self._inodes)
        self._inodes[inode] = what
        return inode

    def _folder(self, path: str) -> _Folder:
        found = self._inodes[0]
        for part in [p for p in path.split("/") if p not in ("", ".")]:
            assert isinstance(found, _Folder)
            found = self._inodes[found.now[part]]
        assert isinstance(found, _Folder)
        return found

    def _at(self, path: str) -> tuple[_Folder, str]:
        folder, _, name = path.rpartition("/")
        return self._folder(folder), name

    def do(self, op: Op) -> None:
        if op.name == "sync_folder":
            self._folder(op.path).sync()
            return
        folder, name = self._at(op.path)
        if op.name in ("write", "append"):
            inode = folder.now.get(name)
            if inode is None:
                folder.put({name: (inode := self._new(_File(None, b"")))})
            file = self._inodes[inode]
            assert isinstance(file, _File)
            file.rewritten = file.rewritten or op.name == "write"
            file.now = (file.now if op.name == "append" else b"") + op.data
        elif op.name == "sync":
            file = self._inodes[folder.now[name]]
            assert isinstance(file, _File)
            file.durable, file.rewritten = file.now, False
        elif op.name == "mkdir":
            folder.put({name: self._new(_Folder())})
        elif op.name in ("unlink", "rmdir"):
            folder.put({name: None})
        elif op.name == "rename":
            other, new = self._at(op.dest)
            inode = folder.now[name]
            if other is folder:
                folder.put({new: inode, name: None})
            else:
                other.put({new: inode})
                folder.put({name: None})

    def view(self) -> Image:
        """Return the disk as a running system sees it."""
        return self._image(lambda f: f.now, lambda f: f.now)

    def images(self, most: int, seed: int) -> Iterator[Image]:
        """Yield what a power cut now may leave: everything if that is at most `most`, else a sample.

        The sample has all or nothing written, each single deviation from these two, and chance for the rest.
        """
        nodes = list(self._inodes.values())
        files = {n: n.contents() for n in nodes if isinstance(n, _File) and len(n.contents()) > 1}
        folders = {n: len(n.events) for n in nodes if isinstance(n, _Folder) and n.events}
        sizes = [len(c) for c in files.values()] + [2] * sum(folders.values())
        for choice in _choices(sizes, most, seed):
            left = iter(choice)
            content = {f: files[f][next(left)] for f in files}
            names = {f: _surviving(f, [bool(next(left)) for _ in range(n)]) for f, n in folders.items()}
            yield self._image(lambda f, c=content: c.get(f, f.now), lambda f, n=names: n.get(f, f.now))

    def _image(self, content: Callable[[_File], bytes], names: Callable[[_Folder], dict[str, int]]) -> Image:
        image: Image = {}

        def walk(folder: _Folder, prefix: str) -> None:
            for name, inode in sorted(names(folder).items()):
                node = self._inodes[inode]
                if isinstance(node, _Folder):
                    image[prefix + name] = None
                    walk(node, f"{prefix}{name}/")
                else:
                    image[prefix + name] = content(node)

        root = self._inodes[0]
        assert isinstance(root, _Folder)
        walk(root, "")
        return image


def _surviving(folder: _Folder, kept: list[bool]) -> dict[str, int]:
    names = dict(folder.durable)
    for changes, there in zip(folder.events, kept, strict=True):
        if there:
            _apply(names, changes)
    return names


def _choices(sizes: list[int], most: int, seed: int) -> Iterator[tuple[int, ...]]:
    total = 1
    for n in sizes:
        total *= n
    if total <= most:
        yield from itertools.product(*map(range, sizes))
        return
    none, every = (0,) * len(sizes), (1,) * len(sizes)
    found = [none, every]
    for base in (none, every):
        for i, n in enumerate(sizes):
            found += [(*base[:i], v, *base[i + 1 :]) for v in range(n)]
    chance = random.Random(seed)
    found = list(dict.fromkeys(found))[: max(2, most)] if most < 3 else list(dict.fromkeys(found))
    if len(found) > max(2, most):
        found = found[:2] + chance.sample(found[2:], most - 2)
    seen = set(found)
    for _ in range(8 * most):
        if len(seen) >= most:
            break
        choice = tuple(chance.randrange(n) for n in sizes)
        if choice not in seen:
            seen.add(choice)
            found.append(choice)
    yield from found


# real folders ---------------------------------------------------------------------------------------------------------


def taken(root: Path) -> Image:
    """Return the image of a real folder."""
    return {
        p.relative_to(root).as_posix(): None if p.is_dir() else p.read_bytes()
        for p in sorted(root.rglob("*"))
        if not p.is_symlink()
    }


def laid_out(image: Image, root: Path, pool: Path) -> None:
    """Write an image to a real folder; the files of a model, which nobody changes, are links into `pool`."""
    root.mkdir(parents=True)
    for path, data in image.items():
        at = root / path
        if data is None:
            at.mkdir()
        elif "/factory/" in path and len(data) > 1:
            kept = pool / f"{hash(data) & (1 << 63) - 1:x}"
            if not kept.exists():
                kept.write_bytes(data)
            at.hardlink_to(kept)
        else:
            at.write_bytes(data)
