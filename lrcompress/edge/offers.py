"""What a group offers to this device: the release for everybody, or the candidate if its turn has come; and shortcuts to it.

`choose`, `shortcut` and `ways` ask a python-tuf client that has refreshed: no further request is made. `bring` fetches a
shortcut and turns it into the payload itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuf.api.metadata import TargetFile
from tuf.ngclient import Updater

from .. import deltas
from ..errors import DownloadError, PayloadError
from ..files import sha256_bytes
from ..manifest import is_sha256
from ..phases import CANDIDATE, STABLE, delta_name, pack_name, takes_candidate
from .disk import Disk
from .fetch import fetch
from .store import Store
from .transport import Transport

if TYPE_CHECKING:
    from .trust import Offer


@dataclass(frozen=True)
class Way:
    """A pack that leads to a base: from `start`, or from nothing."""

    start: str | None
    sha256: str
    path: str
    length: int


@dataclass(frozen=True)
class NewBase:
    """The base that a release is for, as it was signed: its id, the hash of its manifest, the bytes of its files, ways to it."""

    base_id: str
    manifest: str
    length: int
    ways: tuple[Way, ...] = ()

    @classmethod
    def of(cls, value: Any) -> NewBase | None:
        """Return what stands under `base` in a release; None if that is no base."""
        if not isinstance(value, dict) or not all(is_sha256(value.get(k)) for k in ("base_id", "manifest")):
            return None
        length = value.get("bytes")
        if type(length) is not int or not 0 < length < 1 << 40:
            return None
        return cls(value["base_id"], value["manifest"], length)


def choose(
    client: Updater, *, model: str, group: str, device: str | None, channel: str
) -> tuple[TargetFile | None, str]:
    """Return the target that this device is to have, and its path. None: the group has no release for it."""
    stable, candidate = f"{model}/{group}/{STABLE}", f"{model}/{group}/{CANDIDATE}"
    info = client.get_targetinfo(candidate)
    if info is not None:
        about = info.custom if isinstance(info.custom, dict) else {}
        places, sha256 = about.get("places", 0), info.hashes.get("sha256", "")
        if type(places) is int and takes_candidate(device, channel, sha256, places):
            return info, candidate
    return client.get_targetinfo(stable), stable


def shortcut(
    client: Updater, *, model: str, group: str, result: str, have: Collection[str]
) -> tuple[str, str, str, int] | None:
    """Return (base, sha256, path below the repository, length) of the shortest delta to `result` from what is here."""
    found = []
    for base in have:
        folder, name = f"{model}/{group}", delta_name(base, result)
        info = client.get_targetinfo(f"{folder}/{name}")
        if info is not None and info.custom == {"from": base, "to": result}:
            sha256 = info.hashes["sha256"]
            found.append((info.length, base, sha256, f"targets/{folder}/{sha256}.{name}"))
    if not found:
        return None
    length, base, sha256, path = min(found)
    return base, sha256, path, length


def ways(client: Updater, *, model: str, group: str, result: str, have: Collection[str]) -> tuple[Way, ...]:
    """Return the packs that lead to the base `result` from a base that is here or from nothing, the shortest first."""
    found = []
    for start in (None, *have):
        name = pack_name(start, result)
        info = client.get_targetinfo(f"{model}/{group}/{name}")
        if info is not None and info.custom == {"from": start, "to": result}:
            sha256 = str(info.hashes["sha256"])
            found.append(Way(start, sha256, f"targets/{model}/{group}/{sha256}.{name}", info.length))
    return tuple(sorted(found, key=lambda w: w.length))


def bring(offer: Offer, store: Store, transport: Transport, disk: Disk, sleep: Callable[[float], None]) -> bool:
    """Have the offered payload among the downloads, durably, by its shortcut; tell whether that worked."""
    assert offer.shortcut is not None
    base, sha256, path, length = offer.shortcut
    data, part = store.read(base), store.part(sha256)
    if data is None:
        return False
    try:
        fetch(transport, path, length=length, part=part, disk=disk, sleep=sleep)
        delta = disk.read(part)
    except (DownloadError, OSError):
        return False
    right = sha256_bytes(delta) == sha256
    found = patched(data, delta, sha256=offer.sha256, length=offer.length) if right else None
    if found is not None:
        disk.write(store.part(offer.sha256), found)
        store.verify_download(offer.sha256)
    disk.unlink(part)
    return found is not None


def patched(base: bytes, delta: bytes, *, sha256: str, length: int) -> bytes | None:
    """Return the payload with this hash and length; None if the delta does not lead there: then it is fetched whole."""
    try:
        if deltas.ends(delta)[1:] != (sha256, length):
            return None
        return deltas.apply(base, delta, max_bytes=length)
    except PayloadError:
        return None
