"""What a group offers to this device: the release for everybody, or the candidate if its turn has come; and shortcuts to it.

`choose` and `shortcut` ask a python-tuf client that has refreshed: no further request is made. `bring` fetches a shortcut
and turns it into the payload itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from tuf.api.metadata import TargetFile
from tuf.ngclient import Updater

from .. import deltas
from ..errors import DownloadError, PayloadError
from ..files import sha256_bytes
from ..phases import CANDIDATE, STABLE, delta_name, takes_candidate
from .disk import Disk
from .fetch import fetch
from .store import Store
from .transport import Transport

if TYPE_CHECKING:
    from .trust import Offer


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
