"""From a signed offer to bytes that are here, whole and durable: the base first, where a release brings one, then the payload.

Whatever was here before is used: parts of downloads go on, a delta or a pack from what the device has is shorter. What
is left of it is swept by `tidy`, which keeps no more than the state names and the release at hand needs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from ..errors import DownloadError, HostError, PayloadError, UpdateError
from .bases import Base, Bases, NotHere, Wanted
from .disk import Disk
from .fetch import fetch
from .log import StatusLog
from .settings import Settings
from .state import State
from .store import Store
from .transport import Transport, Unavailable

if TYPE_CHECKING:
    from .offers import NewBase, Way
    from .trust import Offer


class BadPack(PayloadError):
    """A pack that was signed does not make the base that was signed."""

    #: Its hash.
    pack = ""


@dataclass
class Staging:
    """Brings releases to one device folder."""

    store: Store
    bases: Bases
    disk: Disk
    log: StatusLog
    settings: Settings
    transport: Transport
    clock: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    sleep: Callable[[float], None] = time.sleep

    def bring(self, offer: Offer, base: Base | Wanted, state: State) -> str | None:
        """Have payload and base of an offer here; return the base's name. What `state` names counts as here.

        Raises `DownloadError`, `HostError`, `UpdateError`; `BadPack` for a release that can only fail again.
        """
        if isinstance(base, Wanted):
            assert offer.base is not None
            self._bring_base(offer, offer.base, state)
        self._bring_payload(offer, state)
        return base.name

    # the payload --------------------------------------------------------------------------------------------------

    def _bring_payload(self, offer: Offer, state: State) -> None:
        if self.store.read(offer.sha256) is not None or self._waits(offer.sha256, state) or self._patch(offer):
            return
        self._need_room(offer.sha256, offer.length)
        self._download(offer, "payload", offer.sha256, offer.path, offer.length)

    def _waits(self, sha256: str, state: State) -> bool:
        """Tell whether a payload is here that the state names: it was made durable before it was named."""
        return state.pending is not None and state.pending.sha256 == sha256 and self.store.staged(sha256) is not None

    def _patch(self, offer: Offer) -> bool:
        """Make the offered payload from one that is here and a shorter download; tell whether that worked."""
        if offer.shortcut is None:
            return False
        from .offers import bring

        base, sha256, _, length = offer.shortcut
        self._need_room(offer.sha256, offer.length + length)
        self.log.write(self.clock(), "download", seq=offer.seq, sha256=sha256, bytes=length, base=base)
        return bring(offer, self.store, self.transport, self.disk, self.sleep)

    # the base -----------------------------------------------------------------------------------------------------

    def _bring_base(self, offer: Offer, brought: NewBase, state: State) -> None:
        """Fetch the shortest pack that leads to a base, and unpack it; the next one, where the first is no good."""
        ways, names = brought.ways, state.bases
        for way in ways:
            last = way is ways[-1]
            try:
                self._check_bytes(offer, way)
                self._need_room(way.sha256, way.length, beside=brought.length + 2 * offer.length)
                self._download(offer, "pack", way.sha256, way.path, way.length)
                self._unpack(brought, way, state)
                return
            except (BadPack, NotHere):
                if last:
                    raise
            except (UpdateError, DownloadError) as e:
                # A link that breaks will be better; what is gone, or other than signed, will not.
                if last or (isinstance(e, DownloadError) and not isinstance(e.__cause__, Unavailable)):
                    raise
        raise UpdateError(
            f"release seq {offer.seq}", f"a pack of base {brought.base_id[:16]}", f"none from {sorted(names)}"
        )

    def _unpack(self, brought: NewBase, way: Way, state: State) -> None:
        pack = self.store.part(way.sha256)
        try:
            self.bases.unpack(pack, brought, way, state.bases)
        except PayloadError as e:
            self.disk.unlink(pack)
            bad = BadPack(e.where, e.expected, e.got, e.remedy)
            bad.pack = way.sha256
            raise bad from e
        except HostError:
            self.disk.unlink(pack)  # it would stand in the way of whatever needs the room
            raise
        self.disk.unlink(pack)

    def _check_bytes(self, offer: Offer, way: Way) -> None:
        most, shortcut = self.settings.max_update_bytes, offer.shortcut
        length = way.length + (offer.length if shortcut is None else min(offer.length, shortcut[3]))
        if most is not None and length > most:
            raise UpdateError(
                f"release seq {offer.seq}", f"at most {int(most)} bytes to fetch, as device.json says", length,
                "raise max_update_bytes, or bring the base on a USB stick",
            )  # fmt: skip

    # both ---------------------------------------------------------------------------------------------------------

    def _download(self, offer: Offer, what: str, sha256: str, path: str, length: int) -> None:
        """Have a file among the downloads, durably. Raises `UpdateError` for other bytes than were signed."""
        part = self.store.part(sha256)
        for left in (1, 0):
            self.log.write(self.clock(), "download", seq=offer.seq, sha256=sha256, bytes=length)
            resumed = fetch(self.transport, path, length=length, part=part, disk=self.disk, sleep=self.sleep)
            try:
                self.store.verify_download(sha256, what)
                return
            except UpdateError:
                if not (resumed and left):  # what lay here from before may be what is wrong: once more from the start
                    raise

    def _need_room(self, sha256: str, length: int, beside: int = 0) -> None:
        most = None if self.settings.max_disk_bytes is None else int(self.settings.max_disk_bytes)
        self.store.need_room(
            sha256, length, beside=beside, used=self.bases.used_bytes(),
            keep_free=int(self.settings.min_free_bytes or 0), most=most,
        )  # fmt: skip


def tidy(store: Store, bases: Bases, state: State, offer: Offer | None = None) -> None:
    """Delete what neither the state nor the release at hand needs; nothing, where the state could not be read."""
    if not state.readable:
        return
    downloading, staged = set[str](), set(state.bases)
    if offer is not None:
        downloading.add(offer.sha256)
        brought = offer.base
        if brought is not None and brought.manifest not in staged:
            staged.add(brought.manifest)
            if bases.find(brought.manifest, staged=True) is None:
                downloading |= {w.sha256 for w in brought.ways}
    waiting = {n for n in staged if bases.stage(n).is_dir() and bases.find(n) is None}
    bases.clean(state.bases)
    store.clean(state.named, downloading, {bases.stage(n).name for n in waiting})
