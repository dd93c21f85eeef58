"""Payloads by their hash: `store/<sha256>`, whole and verified or absent; downloads grow in `dl/<sha256>.part`."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ..errors import HostError, UpdateError
from ..files import sha256_bytes, sha256_file
from ..manifest import is_sha256
from .disk import Disk

#: Room that must stay free beside a payload and its staged copy, for state and log.
RESERVE_BYTES = 256 << 10


class Store:
    """The store of one device folder."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        self.folder, self.downloads, self._disk = folder / "store", folder / "dl", disk

    def path(self, sha256: str) -> Path:
        if not is_sha256(sha256):
            raise ValueError(f"not a sha256: {sha256!r}")
        return self.folder / sha256

    def part(self, sha256: str) -> Path:
        return self.downloads / f"{self.path(sha256).name}.part"

    def read(self, sha256: str) -> bytes | None:
        """Return a payload whose bytes still have their hash; None if it is gone or has rotted."""
        try:
            data = self.path(sha256).read_bytes()
        except OSError:
            return None
        return data if sha256_bytes(data) == sha256 else None

    def need_room(self, sha256: str, length: int) -> None:
        """Raise `HostError` unless what is missing of a payload fits twice."""
        part = self.part(sha256)
        have = part.stat().st_size if part.exists() else 0
        need, free = max(0, 2 * length - have) + RESERVE_BYTES, self._disk.free_bytes(self.folder)
        if free < need:
            raise HostError(
                self.folder, f"{need} bytes free for an update of {length}", f"{free}", "free some space on the device"
            )

    def adopt(self, sha256: str) -> None:
        """Move a complete download into the store, durably. Raises `UpdateError`, and deletes it, if the hash differs."""
        part = self.part(sha256)
        self._disk.sync(part)
        found = sha256_file(part)
        if found != sha256:
            self._disk.unlink(part)
            raise UpdateError(
                "payload",
                f"sha256 {sha256}, as signed",
                found,
                "what the server holds is not what was signed: publish it again",
            )
        self._disk.rename(part, self.path(sha256))
        # Both folders: a rename across folders is two entries, and either may be lost without its own sync.
        self._disk.sync_folder(self.folder)
        self._disk.sync_folder(self.downloads)

    def clean(self, keep: Collection[str], downloading: str | None = None) -> None:
        """Delete every payload outside `keep` and every other download."""
        for path in sorted(self.folder.iterdir()):
            if path.name not in keep:
                self._disk.unlink(path)
        for path in sorted(self.downloads.iterdir()):
            if path.name != f"{downloading}.part":
                self._disk.unlink(path)
