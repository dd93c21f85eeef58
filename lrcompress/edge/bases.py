"""The base models of a device: `factory/`, which is never touched, and what releases brought since.

`bases/<sha256>/` holds a base whose payload passed its trial, `dl/<sha256>.base/` one on its way to that; the name is the
hash of its manifest, which names every file by its own. A release brings a base as a pack (see `packs`): new bytes, and
ranges of a base that is here. Like the store, nothing here is believed because of its name: every use hashes it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import HostError, ManifestError, PayloadError
from ..files import sha256_bytes
from ..manifest import MANIFEST, MAX_MANIFEST_BYTES, Manifest, is_sha256
from ..packs import Pack
from .disk import BLOCK_BYTES, UNFINISHED, Disk
from .folder import BASES, DOWNLOADS, FACTORY

if TYPE_CHECKING:
    from .offers import NewBase, Way

STAGED = ".base"


class Base(NamedTuple):
    """A base that is here: None is the name of the factory's."""

    name: str | None
    folder: Path
    manifest: Manifest


class NotHere(HostError):
    """The base that a pack starts from has rotted since it was looked at: another pack may do."""


class Bases:
    """The bases of one device folder."""

    def __init__(self, folder: Path, disk: Disk, factory: Manifest) -> None:
        self._device, self._disk = folder, disk
        self.folder, self.downloads = folder / BASES, folder / DOWNLOADS
        self.factory = Base(None, folder / FACTORY, factory)

    def stage(self, name: str) -> Path:
        """Return where a base waits for its verdict."""
        if not is_sha256(name):
            raise ValueError(f"not a sha256: {name!r}")
        return self.downloads / f"{name}{STAGED}"

    def find(self, name: str | None, *, staged: bool = False) -> Base | None:
        """Return a base whose every byte still has its hash, `staged` or in use; None if it is gone or has rotted."""
        if name is None:
            return self.factory
        for path in (self.folder / name, self.stage(name))[: 1 + staged]:
            manifest = self._manifest(path, name)
            if manifest is not None and self._whole(path, manifest):
                return Base(name, path, manifest)
        return None

    def choose(
        self, base_ids: Collection[str], names: Collection[str], brought: NewBase | None
    ) -> Base | Wanted | None:
        """Return a base of these ids that is here (the factory's, or one of `names`), else what is to be fetched; None: neither."""
        if self.factory.manifest.base_id in base_ids:
            return self.factory
        for name in sorted(names):
            found = self.find(name, staged=True)
            if found is not None and found.manifest.base_id in base_ids:
                return found
        if brought is None:
            return None
        return self.find(brought.manifest, staged=True) or Wanted(brought.manifest)

    def ids(self, names: Collection[str]) -> list[str]:
        """Return the ids of the factory's base and of those of `names` that are here, as their manifests say."""
        there = [self._manifest(self.folder / name, name) for name in sorted(names)]
        return [self.factory.manifest.base_id, *(m.base_id for m in there if m is not None)]

    def _manifest(self, path: Path, name: str) -> Manifest | None:
        try:
            data = self._disk.read(path / MANIFEST, MAX_MANIFEST_BYTES)
            return Manifest.parse(data) if sha256_bytes(data) == name and not path.is_symlink() else None
        except (OSError, ManifestError):
            return None

    def _whole(self, path: Path, manifest: Manifest) -> bool:
        try:
            return all(self._disk.digest(path / n) == e["sha256"] for n, e in manifest.files.items())
        except OSError:
            return False

    # staging ------------------------------------------------------------------------------------------------------

    def unpack(self, pack: Path, brought: NewBase, way: Way, names: Collection[str]) -> None:
        """Have the base that a pack makes among the downloads, whole and durable.

        Raises `PayloadError` if the pack does not make what was signed, `HostError` if the disk does not take it.
        """
        start = self._start(way, names)
        sizes = {} if start is None else {n: int(e["bytes"]) for n, e in start.manifest.files.items()}
        if start is not None:
            sizes[MANIFEST] = self._disk.size(start.folder / MANIFEST)
        done = self.stage(brought.manifest)
        made = done.with_name(done.name + UNFINISHED)
        for path in (made, done):  # of a process that was killed; one that has rotted
            self._disk.clear(path)
        try:
            opened = Pack(self._disk.blocks(pack), most_bytes=brought.length)
            opened.check(start=way.start, result=brought.base_id, sizes=sizes)
            self._disk.mkdir(made)
            for file, content in opened.files(lambda name, at, n: self._range(start, name, at, n)):
                self._fill(made / file.name, content)
            self._check(made, brought, {f.name for f in opened.recipe.files})
        except (PayloadError, HostError):
            self._disk.clear(made)
            raise
        except OSError as e:
            self._disk.clear(made)
            raise HostError(pack, "files that can be read", e.strerror or str(e), "check this device's storage") from e
        self._disk.sync_folder(made)
        self._disk.rename(made, done)
        self._disk.sync_folder(self.downloads)  # it is long to fetch: its name is to outlive the pack's

    def _start(self, way: Way, names: Collection[str]) -> Base | None:
        """Return the base that a pack starts from. Raises `NotHere`."""
        if way.start is None:
            return None
        for name in (None, *sorted(names)):
            found = self.find(name)
            if found is not None and found.manifest.base_id == way.start:
                return found
        raise NotHere(
            self.folder, f"the base {way.start[:16]}", "none any more", "it is tried again with the next update"
        )

    def _range(self, start: Base | None, name: str, offset: int, length: int) -> Iterator[bytes]:
        assert start is not None
        yield from self._disk.blocks(start.folder / name, offset, length)

    def _fill(self, path: Path, content: Iterator[bytes]) -> None:
        """Write a file, durably, a large piece at a time."""
        waiting = bytearray()
        put: Callable[[Path, bytes], None] = self._disk.write
        for block in content:
            if len(waiting) + len(block) > BLOCK_BYTES:
                put(path, bytes(waiting))
                waiting, put = bytearray(), self._disk.append
            waiting += block
        put(path, bytes(waiting))
        self._disk.sync(path)

    def _check(self, made: Path, brought: NewBase, names: set[str]) -> None:
        """Raise `PayloadError` unless these files are the base that was signed, and one for the applications of this device."""
        remedy = "the publisher publishes the base again"
        data = self._disk.read(made / MANIFEST, MAX_MANIFEST_BYTES)
        if sha256_bytes(data) != brought.manifest:
            raise PayloadError(
                "base: manifest.json", f"sha256 {brought.manifest}, as signed", sha256_bytes(data), remedy
            )
        try:
            manifest = Manifest.parse(data)
            if names != {MANIFEST, *manifest.files}:
                odd = sorted(names ^ {MANIFEST, *manifest.files})
                raise PayloadError("base", "exactly the files of its manifest", f"not so: {', '.join(odd)}", remedy)
            for name, entry in sorted(manifest.files.items()):
                found = self._disk.digest(made / name)
                if found != entry["sha256"]:
                    raise PayloadError(f"base: {name}", f"sha256 {entry['sha256']}", found, remedy)
        except ManifestError as e:
            raise PayloadError(f"base: {e.where}", e.expected, e.got, remedy) from e
        if manifest.base_id != brought.base_id:
            raise PayloadError("base: base_id", f"{brought.base_id}, as signed", manifest.base_id, remedy)
        self._check_ports(manifest)

    def _check_ports(self, manifest: Manifest) -> None:
        """Raise `PayloadError` unless applications can use this base as they use the factory's."""
        ours = self.factory.manifest
        if manifest.model != ours.model:
            raise PayloadError("base: model", ours.model, manifest.model, "publish it for its own devices")
        for side, new in manifest.ports.items():
            if new != ours.ports[side]:
                raise PayloadError(
                    f"base: {side}", f"those of the factory's model: {ours.ports[side]}", f"{new}",
                    "applications of this device know no others: make new devices for it",
                )  # fmt: skip

    # keeping ------------------------------------------------------------------------------------------------------

    def admit(self, name: str | None, keep: Collection[str]) -> None:
        """Have a base whose payload passed its trial in use, durably, beside those in `keep` and no others."""
        if name is None:
            return
        if not self.folder.is_dir():
            self._disk.mkdir(self.folder)
            self._disk.sync_folder(self._device)
        for path in self._disk.names(self.folder):
            if path.name not in keep and path.name != name:
                self._disk.clear(path)
        if self.find(name) is None:
            self._disk.clear(self.folder / name)
            # Or a cut could leave an old one beside the new one, also one that a process deleted which was killed then.
            self._disk.sync_folder(self.folder)
            self._disk.rename(self.stage(name), self.folder / name)
        self._disk.sync_folder(self.folder)

    def clean(self, keep: Collection[str]) -> None:
        """Delete every base outside `keep` that was in use."""
        for path in self._disk.names(self.folder):
            if path.name not in keep or path.is_symlink():
                self._disk.clear(path)

    def used_bytes(self) -> int:
        """Return what all bases beside the factory's take."""
        folders = [*self._disk.names(self.folder), *self._disk.names(self.downloads)]
        return sum(self._disk.size(p) for f in folders if f.is_dir() for p in self._disk.names(f))


class Wanted(NamedTuple):
    """A base that is not here."""

    name: str
