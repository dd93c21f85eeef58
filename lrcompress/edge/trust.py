"""What the signed metadata offer: python-tuf decides, from the factory's root on; the release's own record is checked here."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tuf.api.exceptions import DownloadError as TufDownloadError
from tuf.api.exceptions import DownloadHTTPError, DownloadLengthMismatchError, ExpiredMetadataError, RepositoryError
from tuf.api.metadata import Metadata, Root, Timestamp
from tuf.ngclient import FetcherInterface, Updater

from ..errors import DownloadError, UpdateError
from ..manifest import is_sha256
from .disk import Disk
from .offers import NewBase, choose, shortcut, ways
from .transport import Broken, Transport, Unavailable

_PREFIX = "repository:///"
#: How often one file of the metadata is asked for; they are small.
_TRIES = 3


@dataclass(frozen=True)
class Offer:
    """A signed release: what to fetch, what it is for, and its place in the order of releases."""

    seq: int
    sha256: str
    length: int
    path: str
    base_ids: tuple[str, ...]
    min_version: str
    rollback_of: int | None
    #: (base, sha256, path, length) of a delta from a payload that is here.
    shortcut: tuple[str, str, str, int] | None = None
    #: The base that it is for, where the publisher brings that along.
    base: NewBase | None = None

    @property
    def tried_with(self) -> set[str]:
        """The base and the packs that a refusal of this release may name."""
        return set() if self.base is None else {self.base.manifest, *(w.sha256 for w in self.base.ways)}


class _Fetcher(FetcherInterface):
    """Let python-tuf read through our transport, into memory only, and over a link that breaks now and then."""

    def __init__(self, transport: Transport, sleep: Callable[[float], None]) -> None:
        self._transport, self._sleep = transport, sleep

    def _fetch(self, url: str) -> Iterator[bytes]:
        yield from self._transport.get(url.removeprefix(_PREFIX)).blocks

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Return the content of `url`; the base class would take the way over a file in /tmp, once."""
        for tries in range(1, _TRIES + 1):
            try:
                return self._whole(url, max_length)
            except Unavailable as e:
                if tries == _TRIES or not e.passing:
                    raise DownloadHTTPError(str(e), e.status) from e
            except Broken:
                if tries == _TRIES:
                    raise
            self._sleep(0.5 * 2**tries)
        raise AssertionError("unreachable")

    def _whole(self, url: str, max_length: int) -> bytes:
        found, path = bytearray(), url.removeprefix(_PREFIX)
        for block in self._fetch(url):
            found += block
            if len(found) > max_length:
                raise DownloadLengthMismatchError(f"{path}: more than the {max_length} bytes it may have")
        if not found:  # what is left of an answer whose head was cut
            raise Broken(f"{path}: an empty answer")
        return bytes(found)


class _Client(Updater):
    """python-tuf's client, whose files go through our disk: durable, and written only where they changed.

    What it verified is written by `keep`, whether or not the rest of a refresh succeeds. Its own writing follows no
    order and is never synced, so a power cut could bring a revoked key back.
    """

    def __init__(self, folder: Path, root: bytes, fetcher: _Fetcher, disk: Disk, now: datetime) -> None:
        self._disk, self._fresh = disk, dict[Path, bytes]()
        self._first = Metadata[Root].from_bytes(root).signed.version
        super().__init__(str(folder), f"{_PREFIX}metadata/", fetcher=fetcher, bootstrap=root)
        self._trusted_set.reference_time = now

    def _load_local_metadata(self, rolename: str) -> bytes:
        path = self._path(rolename)
        return self._fresh[path] if path in self._fresh else self._disk.read(path)

    def _path(self, rolename: str) -> Path:
        return Path(self._dir, f"{quote(rolename, '')}.json")

    def _persist_metadata(self, rolename: str, data: bytes) -> None:
        self._fresh[self._path(rolename)] = data

    def _persist_root(self, version: int, data: bytes) -> None:
        if version > self._first:  # the first one is the device's own, and is never written
            self._fresh[Path(self._dir, "root_history", f"{version}.root.json")] = data

    def _update_root_symlink(self) -> None:
        """Leave it out: the device's own root is where trust begins."""

    @property
    def timestamp(self) -> Timestamp:
        return self._trusted_set.timestamp

    def keep(self) -> None:
        """Make durable what was verified: roots first, for they say who may sign the rest."""
        changed = {p: d for p, d in self._fresh.items() if not self._holds(p, d)}
        for folder in sorted({p.parent for p in changed}, key=lambda f: f.name != "root_history"):
            for path in (p for p in changed if p.parent == folder):
                self._disk.replace(path, changed[path])
            self._disk.sync_folder(folder)

    def _holds(self, path: Path, data: bytes) -> bool:
        with contextlib.suppress(OSError):
            return self._disk.read(path) == data
        return False


def newest(
    metadata: Path,
    root: bytes,
    transport: Transport,
    *,
    model: str,
    group: str,
    disk: Disk,
    now: datetime,
    sleep: Callable[[float], None] = time.sleep,
    device: str | None = None,
    channel: str = "stable",
    have: Collection[str] = (),
    bases: Collection[str] = (),
) -> tuple[Offer | None, datetime | None]:
    """Return the newest release of a group (None: there is none) and when the metadata were issued.

    `have`: payloads that are here, `bases`: ids of bases; what is offered from them is offered too.
    Raises `DownloadError` where bytes did not arrive, `UpdateError` where they cannot be trusted.
    """
    shorter, base = None, None
    where = f"update metadata of group {group}"
    try:
        client = _Client(metadata, root, _Fetcher(transport, sleep), disk, now)
        try:
            client.refresh()
            info, target_path = choose(client, model=model, group=group, device=device, channel=channel)
            if info is not None:
                result = str(info.hashes.get("sha256"))
                shorter = shortcut(client, model=model, group=group, result=result, have=have)
                base = NewBase.of(info.custom.get("base")) if isinstance(info.custom, dict) else None
                if base is not None:
                    found = ways(client, model=model, group=group, result=base.base_id, have=bases)
                    base = replace(base, ways=found)
        finally:
            client.keep()
        issued = _issued(client.timestamp.unrecognized_fields.get("issued"))
    except ExpiredMetadataError as e:
        remedy = "the publisher runs 'lrcompress publish refresh'; check this device's clock too"
        raise UpdateError(where, "signatures that have not expired", e, remedy) from e
    except RepositoryError as e:
        raise UpdateError(
            where, "metadata signed for this device, never older than before", f"{type(e).__name__}: {e}"
        ) from e
    except (TufDownloadError, Broken) as e:
        raise DownloadError(
            where,
            "a repository that answers",
            str(e) or type(e).__name__,
            "check the URL and the link; it is tried again with the next update",
        ) from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UpdateError(where, "metadata in TUF's form", f"{type(e).__name__}: {e}") from e
    if info is None:
        return None, issued
    return replace(_offer(info.custom, info.length, info.hashes, target_path), shortcut=shorter, base=base), issued


def _issued(value: Any) -> datetime | None:
    """Return the signed time of issue."""
    if value is None:
        return None
    found = datetime.fromisoformat(str(value))
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)


def _offer(custom: Any, length: int, hashes: dict[str, str], target_path: str) -> Offer:
    def need(good: object, key: str, expected: str) -> None:
        if not good:
            got = custom.get(key, "nothing") if isinstance(custom, dict) else custom
            raise UpdateError(
                f"release record: {key}", expected, got, "the publisher must sign a release of this version"
            )

    need(isinstance(custom, dict), "custom", "an object")
    seq, ids, undone = custom.get("seq"), custom.get("base_ids"), custom.get("rollback_of")
    need(type(seq) is int and seq > 0, "seq", "a positive whole number")
    sha256 = hashes.get("sha256")
    need(is_sha256(sha256) and custom.get("sha256") == sha256, "sha256", "the hash of the signed target")
    need(isinstance(ids, list) and ids and all(map(is_sha256, ids)), "base_ids", "a list of hex sha256")
    need(isinstance(custom.get("min_version"), str), "min_version", "a version")
    need(undone is None or (type(undone) is int and 0 < undone < seq), "rollback_of", "an earlier seq")
    base = NewBase.of(custom.get("base"))
    good = custom.get("base") is None or (base is not None and base.base_id in ids)
    need(good, "base", "one of base_ids with base_id, manifest and bytes")
    folder, _, name = target_path.rpartition("/")
    return Offer(
        seq, str(sha256), length, f"targets/{folder}/{sha256}.{name}", tuple(ids), custom["min_version"], undone
    )
