"""One update, from the signed metadata to a verdict that is on disk before anyone is told.

    IDLE → CHECK → DOWNLOAD → VERIFY → STAGED → TRIAL → ACTIVE | REFUSED (a check failed: never again)
                                                      | PENDING (no verdict: again, then after a growing while)

Every arrow can be cut by a loss of power: the state files name only what is durable, and the next call goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import RELEASED, __version__
from ..errors import DownloadError, HostError, LrcompressError, PayloadError, UpdateError
from ..files import sha256_bytes
from ..golden import GoldenSet
from ..manifest import Manifest, version_key
from ..runtime import Session
from ..runtime.session import Active
from .disk import Disk
from .fetch import fetch
from .identity import Identity
from .log import StatusLog
from .state import Entry, Pending, State, StateFiles
from .store import Store
from .transport import Transport
from .trial import Limits, check

if TYPE_CHECKING:
    from .trust import Offer

#: Trials in a row without a verdict before the payload has to wait.
TRIALS = 2
BACKOFF, MAX_BACKOFF = timedelta(hours=1), timedelta(hours=24)
#: A publisher's clock may be this far ahead of a device's.
CLOCK_SKEW = timedelta(hours=1)


@dataclass
class Outcome:
    """What one update came to. `activate` is set where another payload is to be served from now on."""

    state: str
    reason: str = ""
    error: LrcompressError | None = None
    activate: Active | None = None


@dataclass
class Updater:
    """The state machine of one device folder. The caller holds its lock."""

    folder: Path
    files: StateFiles
    store: Store
    log: StatusLog
    disk: Disk
    session: Session
    golden: GoldenSet
    limits: Limits
    transport: Transport
    root: bytes
    group: str
    identity: Identity | None = None
    clock: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    sleep: Callable[[float], None] = time.sleep

    @property
    def manifest(self) -> Manifest:
        return self.session.manifest

    def run(self) -> Outcome:
        """Bring the device to the newest healthy release; return how far it got. Raises nothing that an update may meet."""
        state = self._mend(self.files.read())
        try:
            self._check_clock(state)
            from .trust import newest  # python-tuf is loaded for an update, not for serving

            try:
                offer, issued = newest(
                    self.folder / "metadata", self.root, self.transport, model=self.manifest.model, group=self.group,
                    device=None if self.identity is None else self.identity.id, channel=self.identity.channel if self.identity else "stable",
                    have=state.named,
                )  # fmt: skip
            except DownloadError:
                if state.pending is None or self.store.read(state.pending.sha256) is None:
                    raise
                return self._try(state, state.pending)  # staged and trusted already: needs no network
            return self._take(self._trust_time(state, issued), offer)
        except (UpdateError, PayloadError) as e:
            return self._end("rejected", e)
        except LrcompressError as e:
            return self._end("failed", e)

    def _end(self, state: str, error: LrcompressError) -> Outcome:
        self.log.write(self.clock(), state, reason=str(error))
        return Outcome(state, str(error), error)

    def _mend(self, state: State) -> State:
        """Take out of the state what the store no longer holds whole, and delete what the state does not name."""
        if not state.readable:
            return state
        whole = {sha: self.store.read(sha) is not None for sha in state.named}
        mended = state
        if state.active is not None and not whole[state.active.sha256]:
            self.log.write(self.clock(), "rotted", sha256=state.active.sha256, seq=state.active.seq)
            mended = replace(mended, active=state.previous, previous=None)
        if mended.active is not None and not whole[mended.active.sha256]:
            mended = replace(mended, active=None)
        if mended.previous is not None and not whole[mended.previous.sha256]:
            mended = replace(mended, previous=None)
        if mended.pending is not None and not whole[mended.pending.sha256]:
            mended = replace(mended, pending=None)
        if mended != state:
            mended = self.files.write(mended)
        self.store.clean(mended.named, self._latest_part())
        return mended

    def _latest_part(self) -> str | None:
        """Return the hash of the download that was at work last: it may go on."""
        parts = sorted(self.store.downloads.glob("*.part"), key=lambda p: p.stat().st_mtime)
        return parts[-1].stem if parts else None

    def _check_clock(self, state: State) -> None:
        floor = datetime.fromisoformat(RELEASED).replace(tzinfo=UTC)
        if state.trusted_time is not None:
            floor = max(floor, datetime.fromisoformat(state.trusted_time) - CLOCK_SKEW)
        if self.clock() < floor:
            raise HostError(
                "clock",
                f"a time after {floor.isoformat()}, which is known to be past",
                self.clock().isoformat(timespec="seconds"),
                "set this device's clock",
            )

    def _trust_time(self, state: State, issued: datetime | None) -> State:
        """Remember the newest signed time of issue; it is written with the next change of the state."""
        known = None if state.trusted_time is None else datetime.fromisoformat(state.trusted_time)
        if issued is None or (known is not None and issued <= known):
            return state
        return replace(state, trusted_time=issued.isoformat())

    def _take(self, state: State, offer: Offer | None) -> Outcome:
        """Decide about the release that is offered."""
        if offer is None:
            self._save_time(state)
            return Outcome("up_to_date", f"group {self.group} has no release yet")
        if offer.seq < state.seq or (offer.seq == state.seq and offer.sha256 != state.seq_sha256):
            raise UpdateError(
                f"release of group {self.group}",
                f"a seq above {state.seq}",
                f"{offer.seq} again, with other bytes" if offer.seq == state.seq else offer.seq,
                "an old release was signed anew: the publisher signs one with a higher seq",
            )
        if (refusal := state.refusal(offer.sha256)) is not None:
            self._save_time(state)
            raise PayloadError(
                f"release seq {offer.seq}",
                "a payload that passes its checks",
                refusal.reason,
                "the publisher repairs it and publishes again",
            )
        serving = state.active
        if offer.seq == state.seq and (
            state.declined == offer.sha256 or (serving is not None and serving.sha256 == offer.sha256)
        ):
            self._save_time(state)
            self.store.clean(state.named)
            declined = serving is None or serving.sha256 != offer.sha256
            return Outcome("up_to_date", "rolled back here; the next release will be taken" if declined else "")
        self._check_offer(offer)
        if serving is not None and serving.sha256 == offer.sha256:  # the same bytes under a new seq
            self._commit(state, Pending(offer.sha256, offer.seq, rollback_of=offer.rollback_of))
            return Outcome("updated", "the same payload, signed again")
        pending = state.pending
        if pending is None or pending.sha256 != offer.sha256:
            self._stage(offer)
            pending = Pending(offer.sha256, offer.seq, rollback_of=offer.rollback_of)
        return self._try(state, replace(pending, seq=offer.seq, rollback_of=offer.rollback_of))

    def _save_time(self, state: State) -> None:
        """Write a newer trusted time, but no more than once a day: flash wears."""
        stored = self.files.read()
        if state.trusted_time is None or state.trusted_time == stored.trusted_time:
            return
        known = None if stored.trusted_time is None else datetime.fromisoformat(stored.trusted_time)
        if known is None or datetime.fromisoformat(state.trusted_time) - known >= timedelta(days=1):
            self.files.write(state)

    def _check_offer(self, offer: Offer) -> None:
        where = f"release seq {offer.seq}"
        if self.manifest.base_id not in offer.base_ids:
            raise UpdateError(
                where,
                f"base {self.manifest.base_id[:16]}",
                ", ".join(b[:16] for b in offer.base_ids),
                "publish a payload for this base",
            )
        if version_key(offer.min_version) > version_key(__version__):
            raise UpdateError(
                where,
                f"at most lrcompress {__version__}",
                f"one that needs {offer.min_version}",
                "update lrcompress on this device",
            )
        if not 0 < offer.length <= self.limits.max_payload_bytes:
            raise UpdateError(
                where,
                f"at most {int(self.limits.max_payload_bytes)} bytes, as device.json says",
                offer.length,
                "publish a smaller payload",
            )

    def _stage(self, offer: Offer) -> None:
        """Have the offered payload in the store, durably, whatever was there before."""
        if self.store.read(offer.sha256) is not None:
            return
        self.disk.unlink(self.store.path(offer.sha256))  # rotted, if it is there
        if self._patch(offer):
            return
        part = self.store.part(offer.sha256)
        for left in (1, 0):
            self.store.need_room(offer.sha256, offer.length)
            self.log.write(self.clock(), "download", seq=offer.seq, sha256=offer.sha256, bytes=offer.length)
            resumed = fetch(
                self.transport, offer.path, length=offer.length, part=part, disk=self.disk, sleep=self.sleep
            )
            try:
                self.store.adopt(offer.sha256)
                return
            except UpdateError:
                if not (resumed and left):  # what lay here from before may be what is wrong: once more from the start
                    raise

    def _patch(self, offer: Offer) -> bool:
        """Make the offered payload from one that is here and a shorter download; tell whether that worked."""
        if offer.shortcut is None:
            return False
        from .offers import patched

        base, sha256, path, length = offer.shortcut
        data, part = self.store.read(base), self.store.part(sha256)
        if data is None:
            return False
        self.store.need_room(offer.sha256, offer.length + length)
        self.log.write(self.clock(), "download", seq=offer.seq, sha256=sha256, bytes=length, base=base)
        try:
            fetch(self.transport, path, length=length, part=part, disk=self.disk, sleep=self.sleep)
        except DownloadError:
            return False
        delta = part.read_bytes()
        found = (
            patched(data, delta, sha256=offer.sha256, length=offer.length) if sha256_bytes(delta) == sha256 else None
        )
        if found is not None:
            self.disk.write(self.store.part(offer.sha256), found)
            self.store.adopt(offer.sha256)
        self.disk.unlink(part)
        return found is not None

    def _try(self, state: State, pending: Pending) -> Outcome:
        """Give a staged payload its trial, counted on disk before it is loaded."""
        now = self.clock()
        if pending.retry_at is not None:
            wait = datetime.fromisoformat(pending.retry_at) - now
            if timedelta(0) < wait <= MAX_BACKOFF:  # a wait beyond the longest means that the clock was set back
                return Outcome(
                    "pending", f"no verdict in {pending.trials} trials; the next one is due {pending.retry_at}"
                )
        elif pending.trials and pending.trials % TRIALS == 0:
            due = now + min(MAX_BACKOFF, BACKOFF * 2 ** min(10, pending.trials // TRIALS - 1))
            waiting = replace(pending, retry_at=due.isoformat(timespec="seconds"))
            self.files.write(replace(state, pending=waiting))
            self.log.write(now, "pending", seq=pending.seq, sha256=pending.sha256, trials=pending.trials)
            return Outcome("pending", f"no verdict in {pending.trials} trials; the next one is due {waiting.retry_at}")
        pending = replace(pending, trials=pending.trials + 1, retry_at=None)
        state = self.files.write(replace(state, pending=pending))
        self.log.write(now, "trial", seq=pending.seq, sha256=pending.sha256, trials=pending.trials)
        data = self.store.read(pending.sha256)
        if data is None:
            raise HostError(
                self.store.path(pending.sha256),
                "the payload that was just verified",
                "other bytes",
                "check this device's storage",
            )
        try:
            prepared = check(data, self.session, self.golden, self.limits)
        except PayloadError as e:
            state = self.files.write(state.refuse(pending.sha256, pending.seq, str(e)))
            self.store.clean(state.named)
            raise
        except (MemoryError, OSError) as e:
            raise HostError(
                "trial",
                "memory and disk for one more payload",
                str(e) or "out of memory",
                "free some; it is tried again",
            ) from e
        self._commit(state, pending)
        return Outcome("rolled_back" if pending.rollback_of is not None else "updated", activate=prepared)

    def _commit(self, state: State, pending: Pending) -> None:
        """Make a payload that passed the active one. After this returns, the update is acknowledged and survives."""
        entry, previous = Entry(pending.sha256, pending.seq), state.active
        if previous is None or previous.sha256 == entry.sha256:
            previous = state.previous
        if previous is not None and previous.sha256 == entry.sha256:
            previous = None
        state = replace(
            state, active=entry, previous=previous, pending=None, declined=None, seq=max(state.seq, entry.seq), seq_sha256=entry.sha256
        )  # fmt: skip
        state = self.files.write(state)
        self.log.write(self.clock(), "active", seq=entry.seq, sha256=entry.sha256, rollback_of=pending.rollback_of)
        self.store.clean(state.named)


def describe_serving(entry: Entry | None) -> dict[str, Any]:
    """Return `serving` or `previous` of the JSON contract."""
    if entry is None:
        return {"kind": "factory", "sha256": None, "seq": 0}
    return {"kind": "payload", "sha256": entry.sha256, "seq": entry.seq}
