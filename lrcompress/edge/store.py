"""Payloads by their hash: `store/<sha256>` holds what passed its trial, `dl/<sha256>.part` what is on its way to one.

A payload moves from the one to the other when it is about to be served. Nothing here is believed because of its name:
every read is hashed.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ..errors import HostError, UpdateError
from ..files import sha256_bytes
from ..manifest import is_sha256
from .disk import Disk
from .folder import DOWNLOADS, STORE

#: Room that must stay free beside a payload, for state, metadata and log.
RESERVE_BYTES = 256 << 10
PART = ".part"


class Store:
    """The store of one device folder."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        self.folder, self.downloads, self._disk = folder / STORE, folder / DOWNLOADS, disk

    def path(self, sha256: str) -> Path:
        return self.folder / _checked(sha256)

    def part(self, sha256: str) -> Path:
        return self.downloads / f"{_checked(sha256)}{PART}"

    def read(self, sha256: str) -> bytes | None:
        """Return a stored payload whose bytes still have their hash; None if it is gone or has rotted."""
        return self._whole(self.path(sha256), sha256)

    def staged(self, sha256: str) -> bytes | None:
        """Return a payload that is stored, or complete among the downloads."""
        found = self.read(sha256)
        return found if found is not None else self._whole(self.part(sha256), sha256)

    def _whole(self, path: Path, sha256: str) -> bytes | None:
        try:
            data = self._disk.read(path)
        except OSError:
            return None
        return data if sha256_bytes(data) == sha256 else None

    def need_room(
        self, sha256: str, length: int, *, beside: int = 0, used: int = 0, keep_free: int = 0, most: int | None = None
    ) -> None:
        """Raise `HostError` unless what is missing of a payload fits twice, and all of it under `most` bytes.

        `beside`: bytes that the update needs as well; `used`: what lies elsewhere and counts too.
        """
        have = self._disk.size(self.part(sha256))
        used += sum(self._disk.size(p) for f in (self.folder, self.downloads) for p in self._disk.names(f)) - have
        length += beside
        if most is not None and used + length > most:
            raise HostError(
                self.folder, f"at most {most} bytes of payloads, as device.json says", used + length, "raise max_disk_bytes, or publish a smaller payload"
            )  # fmt: skip
        need = max(0, 2 * length - have - beside) + RESERVE_BYTES + keep_free
        free = self._disk.free_bytes(self.folder)
        if free < need:
            raise HostError(
                self.folder, f"{need} bytes free for an update of {length}", f"{free}", "free some space on the device"
            )

    def verify_download(self, sha256: str, what: str = "payload") -> None:
        """Make a complete download durable. Raises `UpdateError`, and deletes it, if its hash is another.

        Its name among the downloads may be lost in a power cut: then it is downloaded again, and nothing else is.
        """
        part = self.part(sha256)
        try:
            self._disk.sync(part)
        except HostError:
            self._disk.unlink(part)  # after a sync that failed nobody knows what is on the disk, whatever reads say
            raise
        found = self._disk.digest(part)
        if found != sha256:
            self._disk.unlink(part)
            raise UpdateError(
                what,
                f"sha256 {sha256}, as signed",
                found,
                "what the server holds is not what was signed: publish it again",
            )

    def admit(self, sha256: str, keep: Collection[str]) -> None:
        """Have a payload that passed its trial in the store, durably, beside those in `keep` and no others."""
        gone = [p for p in self._disk.names(self.folder) if p.name not in keep and p.name != sha256]
        for path in gone:
            self._disk.unlink(path)
        if self.read(sha256) is None:
            # A cut must not leave three: what was deleted, here or by a process that was killed since, is gone first.
            self._disk.sync_folder(self.folder)
            self._disk.rename(self.part(sha256), self.path(sha256))
        # The name in the store must last, also one that a process gave it which was killed before it could see to that.
        # The old name among the downloads may come back, and is swept then.
        self._disk.sync_folder(self.folder)

    def clean(self, keep: Collection[str], downloading: Collection[str] = (), staged: Collection[str] = ()) -> None:
        """Delete every payload outside `keep`, and every download but those of `keep`, `downloading` and folders `staged`."""
        parts = {f"{sha}{PART}" for sha in {*keep, *downloading} if not self.path(sha).exists()}
        for path in self._disk.names(self.folder):
            if path.name not in keep or not _is_file(path):
                self._disk.clear(path)
        for path in self._disk.names(self.downloads):
            known = path.name in parts if _is_file(path) else path.name in staged and not path.is_symlink()
            if not known:
                self._disk.clear(path)


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _checked(sha256: str) -> str:
    if not is_sha256(sha256):
        raise ValueError(f"not a sha256: {sha256!r}")
    return sha256
