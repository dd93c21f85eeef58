"""Every call by which a device changes its folder, in one place: tests record them, cut between them, make them fail."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..files import disk_errors, fsync_folder


class Disk:
    """The real disk. A full or forbidden one raises `HostError`."""

    def write(self, path: Path, data: bytes) -> None:
        """Create or replace the content of `path`; not durable until `sync`."""
        with disk_errors(path), open(path, "wb") as f:
            f.write(data)

    def append(self, path: Path, data: bytes) -> None:
        """Append to `path`; not durable until `sync`."""
        with disk_errors(path), open(path, "ab") as f:
            f.write(data)

    def sync(self, path: Path) -> None:
        """Make the content of a file durable."""
        with disk_errors(path):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""
        with disk_errors(path):
            fsync_folder(path)

    def rename(self, source: Path, dest: Path) -> None:
        """Give `source` the name `dest`, replacing what had it."""
        with disk_errors(dest):
            source.replace(dest)

    def unlink(self, path: Path) -> None:
        """Remove a file that may be gone already."""
        with disk_errors(path):
            path.unlink(missing_ok=True)

    def free_bytes(self, path: Path) -> int:
        return shutil.disk_usage(path).free
