"""The only door to a device's disk: tests record what goes through it, cut the power between two calls, make them fail.

Nothing that is written is durable before it is synced: the content of a file by `sync`, its name by `sync_folder` of
the folder around it. `replace` does the first half of that: the caller syncs the folder once for all it replaced.
Reading follows no link in the last step of a path and takes regular files only.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from ..errors import HostError
from ..files import fsync_folder

#: What a file is called until it is whole. Whatever bears it after a restart was never finished.
UNFINISHED = ".tmp"
#: What is read or written of a large file at once.
BLOCK_BYTES = 1 << 20

_REMEDY = {
    errno.ENOSPC: "free some space on the device",
    errno.EDQUOT: "free some space on the device",
    errno.EIO: "the storage is failing: replace it",
}


@dataclass
class Tally:
    """What was asked of the disk: flash wears by it."""

    fsyncs: int = 0
    bytes: int = 0

    def since(self, before: Tally) -> Tally:
        return Tally(self.fsyncs - before.fsyncs, self.bytes - before.bytes)

    def copy(self) -> Tally:
        return Tally(self.fsyncs, self.bytes)


class Disk:
    """The real disk. Whatever it refuses, for want of space, permission or health, is a `HostError`."""

    def __init__(self) -> None:
        self.tally = Tally()

    # changing -----------------------------------------------------------------------------------------------------

    def write(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        """Create or replace the content of `path`; not durable until `sync`."""
        self._put(path, data, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)

    def append(self, path: Path, data: bytes) -> None:
        """Append to `path`; not durable until `sync`."""
        self._put(path, data, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def _put(self, path: Path, data: bytes, flags: int, mode: int) -> None:
        with _told(path):
            fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
            with open(fd, "wb", buffering=0) as f:
                left = memoryview(data)
                while left:
                    left = left[f.write(left) :]
        self.tally.bytes += len(data)

    def sync(self, path: Path) -> None:
        """Make the content of a file durable."""
        with _told(path):
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        self.tally.fsyncs += 1

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""
        with _told(path):
            fsync_folder(path)
        self.tally.fsyncs += 1

    def rename(self, source: Path, dest: Path) -> None:
        """Give `source` the name `dest`, replacing what had it."""
        with _told(dest):
            source.replace(dest)

    def unlink(self, path: Path) -> None:
        """Remove a file or a link that may be gone already."""
        with _told(path):
            path.unlink(missing_ok=True)

    def mkdir(self, path: Path, mode: int = 0o755) -> None:
        """Make a folder."""
        with _told(path):
            path.mkdir(mode)

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        with _told(path):
            path.rmdir()

    # made of these ------------------------------------------------------------------------------------------------

    def replace(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        """Have `path` hold `data`, or what it held before; which of the two is certain after `sync_folder`."""
        unfinished = path.with_name(path.name + UNFINISHED)
        self.write(unfinished, data, mode)
        self.sync(unfinished)
        self.rename(unfinished, path)

    def clear(self, folder: Path) -> None:
        """Remove a folder with all that is in it; it may be gone already."""
        if not folder.is_dir() or folder.is_symlink():
            self.unlink(folder)
            return
        for path in sorted(folder.iterdir()):
            self.clear(path)
        self.rmdir(folder)

    def sweep(self, folder: Path) -> None:
        """Remove what a cut left unfinished in a folder."""
        for path in self.names(folder):
            if path.name.endswith(UNFINISHED):
                self.clear(path)

    # looking ------------------------------------------------------------------------------------------------------

    def read(self, path: Path, most: int = 1 << 30) -> bytes:
        """Return the content of a regular file of at most `most` bytes. Raises `OSError`, also for a link."""
        with self._opened(path, most) as (f, size):
            return f.read(size)

    def blocks(self, path: Path, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        """Yield a range of a regular file (to its end, without a length), a piece at a time. Raises `OSError`."""
        with self._opened(path) as (f, _):
            f.seek(offset)
            while block := f.read(BLOCK_BYTES if length is None else min(BLOCK_BYTES, length)):
                length = None if length is None else length - len(block)
                yield block
        if length:
            raise OSError(errno.EIO, f"{length} bytes too few", str(path))

    def digest(self, path: Path) -> str:
        """Return the hex SHA-256 of a regular file, however large. Raises `OSError`."""
        with self._opened(path) as (f, _):
            return hashlib.file_digest(f, "sha256").hexdigest()

    @contextlib.contextmanager
    def _opened(self, path: Path, most: int | None = None) -> Iterator[tuple[FileIO, int]]:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        # Unbuffered, and one read for all of it: every further call may have to wait for the interpreter's lock.
        with open(fd, "rb", buffering=0) as f:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or (most is not None and found.st_size > most):
                at_most = "" if most is None else f" of at most {most} bytes"
                raise OSError(errno.EINVAL, f"not a regular file{at_most}", str(path))
            yield f, found.st_size

    def size(self, path: Path) -> int:
        """Return the bytes of a regular file; 0 if there is none."""
        with contextlib.suppress(OSError):
            found = path.lstat()
            return found.st_size if stat.S_ISREG(found.st_mode) else 0
        return 0

    def names(self, folder: Path) -> list[Path]:
        """Return what is in a folder, sorted; nothing if it cannot be read."""
        with contextlib.suppress(OSError):
            return sorted(folder.iterdir())
        return []

    def free_bytes(self, path: Path) -> int:
        return shutil.disk_usage(path).free


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn what a disk says when it refuses into a `HostError` (exit 10)."""
    try:
        yield
    except OSError as e:
        remedy = _REMEDY.get(e.errno or 0, "check the permissions of the folder and how its disk is mounted")
        raise HostError(path, "a disk that takes what is written", e.strerror or str(e), remedy) from e
