"""Results by the hash of what they depend on, in a hidden folder beside the output that they are for.

    .compressed.work-0123456789ab/   of one command (what is asked of which model), found again by the same command
        store.json                   who made it
        lock                         held by the run that uses it, and let go however that ends
        KEY.safetensors              one result; its header holds the hash of its content

Entries appear whole, by rename. They are not forced to the disk: one that a power cut spoils is found by its hash.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CommandError, HostError, LrcompressError, LrcompressWarning
from ..files import disk_errors, made_by, sha256_json, write_json
from ..model.stored import StoredFile
from ..model.tensors import digest_tensors
from .jobs import Packed, decode, encode

MAKER = "lrcompress work"
MARKER = "store.json"


class Store:
    """The results of one command. A store that another run holds is refused, and one of another command never seen."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder, self._lock = folder, lock

    @classmethod
    @contextlib.contextmanager
    def open(cls, dest: Path, command: Any) -> Iterator[Store]:
        """Open, or make, the store beside `dest` for what `command` (plain values) describes.

        Raises `HostError` where it cannot be written, or another run of the same command is at work.
        """
        dest = Path(os.path.abspath(dest))  # noqa: PTH100 (a link stays the link that was named)
        folder = dest.parent / f".{dest.name}.work-{sha256_json(command)[:12]}"
        new_parents = [p for p in dest.parents if not p.exists()]
        lock = -1
        try:
            with disk_errors(dest):
                lock = _locked(folder)
            yield cls(folder, lock)
        except LrcompressError as e:
            # The same command would fail in the same way, unless it was this machine's fault.
            if lock >= 0 and not isinstance(e, HostError):
                _remove(folder)
            raise
        finally:
            if lock >= 0:
                _leave_if_empty(folder)
                os.close(lock)
            for parent in new_parents:
                with contextlib.suppress(OSError):  # it holds the store, or the output
                    parent.rmdir()

    def get(self, key: str) -> Packed | None:
        """Return a result, or None if it is not there; a damaged one is removed, which is said."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            packed, recorded = _read(path)
            if _content(key, packed) == recorded:
                return packed
            got = "other content than was written"
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as e:
            got = str(e)
        path.unlink(missing_ok=True)
        text = f"{path}: a kept result is damaged ({got}); it is computed again"
        warnings.warn(text, LrcompressWarning, stacklevel=2)
        return None

    def put(self, key: str, packed: Packed) -> None:
        """Keep a result. Raises `HostError` if the disk does not take it."""
        path = self._path(key)
        size = sum(t.nbytes for t in packed.tensors.values())
        with room_for(size, self.folder), disk_errors(self.folder):
            fd, name = tempfile.mkstemp(dir=self.folder, prefix=".", suffix=".tmp")
            os.close(fd)
            try:
                about = {"about": encode(packed).decode(), "sha256": _content(key, packed)}
                save_file(packed.tensors, name, metadata=about)
                Path(name).replace(path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise

    def file(self, key: str) -> StoredFile:
        """Return the file of a result that was kept: its tensors can be read without the others."""
        return StoredFile.open(self._path(key))

    @property
    def n_bytes(self) -> int:
        return sum(p.stat().st_size for p in self.folder.glob("*.safetensors"))

    def remove(self) -> None:
        """Remove the store: the output is complete."""
        _remove(self.folder)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


@contextlib.contextmanager
def room_for(size_bytes: int, folder: Path) -> Iterator[None]:
    """Say what was needed if the disk is full."""
    try:
        yield
    except HostError as e:
        if "space" not in e.remedy:
            raise
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        got = f"{e.got}: {free:,} bytes are free, {size_bytes:,} are needed next"
        raise HostError(
            e.where, e.expected, got, "free some space, and give the same command again: it continues"
        ) from e


def _locked(folder: Path) -> int:
    """Return the lock of a folder that is there and ours; a half-made one is made again."""
    for _ in range(100):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            os.close(lock)
            raise HostError(
                folder, "one run at a time of one command", "another one at work",
                "wait until it is done, or choose another place with -o",
            ) from e  # fmt: skip
        # The one before may have removed the folder between our opening it and getting the lock.
        if _same(lock, folder / "lock"):
            break
        os.close(lock)
    else:
        raise HostError(folder, "a folder that stays", "one that is removed again and again")
    try:
        ours = made_by(folder, MARKER) == MAKER
        others = [p.name for p in folder.iterdir() if p.name != "lock" and not _is_left(p)]
        if others and not ours:
            got = f"a folder made by something else, with {others[0]}"
            raise CommandError(folder, "a work folder of ours, or none", got, "move it away")
        for left in folder.iterdir():
            if _is_left(left):
                left.unlink(missing_ok=True)
        if not ours:
            write_json(folder / MARKER, {"made_by": MAKER, "schema": 1})
    except CommandError:
        os.close(lock)
        raise
    except BaseException:
        _leave_if_empty(folder)
        os.close(lock)
        raise
    return lock


def _is_left(path: Path) -> bool:
    """Say whether a kill left this in the middle of a write."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _same(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False


def _leave_if_empty(folder: Path) -> None:
    """Remove a store without results: there is nothing to continue from."""
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a store, the marker after the results: what a kill leaves of it is still known as ours."""
    with contextlib.suppress(OSError):
        for path in folder.glob("*.safetensors"):
            path.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _read(path: Path) -> tuple[Packed, str]:
    with safe_open(path, framework="pt", device="cpu") as f:
        about = f.metadata() or {}
        tensors: dict[str, Tensor] = {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118
    return Packed(tensors, decode(about["about"])), about["sha256"]


def _content(key: str, packed: Packed) -> str:
    """Return the hash of a result under its key: an entry that was renamed does not have it."""
    return digest_tensors(packed.tensors, key.encode(), encode(packed))
