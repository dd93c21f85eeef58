"""One update, from the signed metadata to a verdict that is on disk before anyone is told.

    IDLE → CHECK → DOWNLOAD → VERIFY → STAGED → TRIAL → (PROBATION) → ACTIVE | REFUSED (a check failed: never again)
                                                                             | PENDING (no verdict: again, then after a growing while)

Every arrow can be cut by a loss of power: the state files name only what is durable, and the next call goes on. What a
payload must be before it serves is spread over the arrows: signature and `seq` (CHECK), length and hash (VERIFY),
slots, shapes, numbers, answers and latency (TRIAL), the operator's own program (PROBATION). One machine, one file.
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
from ..manifest import Manifest, version_key
from .disk import Disk
from .fetch import fetch
from .folder import METADATA, ROOTS
from .health import boot_id, check_health
from .log import StatusLog
from .settings import Settings
from .state import Entry, Pending, Probation, State, StateFiles
from .store import Store
from .transport import Transport
from .trial import NoVerdict, Trial

if TYPE_CHECKING:
    from .identity import Identity
    from .trust import Offer

#: Trials in a row without a verdict before the payload has to wait: two power cuts in its trial must not delay it.
TRIALS = 3
BACKOFF, MAX_BACKOFF = timedelta(minutes=10), timedelta(hours=24)
#: A publisher's clock may be this far ahead of a device's.
CLOCK_SKEW = timedelta(hours=1)


@dataclass
class Outcome:
    """What one update came to."""

    state: str
    reason: str = ""
    error: LrcompressError | None = None


@dataclass
class Updater:
    """The state machine of one device folder. The caller holds its lock; `switched` is called when another payload is to be served."""

    folder: Path
    files: StateFiles
    store: Store
    log: StatusLog
    disk: Disk
    manifest: Manifest
    settings: Settings
    trial: Trial
    transport: Transport
    root: bytes
    group: str
    identity: Identity | None = None
    clock: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    sleep: Callable[[float], None] = time.sleep
    switched: Callable[[], None] = lambda: None

    def run(self) -> Outcome:
        """Bring the device to the newest healthy release; return how far it got. Raises nothing that an update may meet."""
        try:
            return self._run(mend(self.files, self.store, self.log, self.disk, self.clock(), self.folder))
        except (UpdateError, PayloadError) as e:
            return self._end("rejected", e)
        except LrcompressError as e:
            return self._end("failed", e)

    def _end(self, state: str, error: LrcompressError) -> Outcome:
        self.log.write(self.clock(), state, reason=str(error))
        return Outcome(state, str(error), error)

    # whether ------------------------------------------------------------------------------------------------------

    def _run(self, state: State) -> Outcome:
        self._check_clock(state)
        from .trust import newest  # python-tuf is loaded for an update, not for serving

        try:
            offer, issued = newest(
                self.folder / METADATA, self.root, self.transport, model=self.manifest.model, group=self.group,
                disk=self.disk, now=self.clock(), sleep=self.sleep, have=state.named,
                device=None if self.identity is None else self.identity.id,
                channel="stable" if self.identity is None else self.identity.channel,
            )  # fmt: skip
        except DownloadError:
            if state.pending is None or self.store.staged(state.pending.sha256) is None:
                raise
            return self._try(state, state.pending)  # staged and trusted already: needs no network
        return self._take(self._trust_time(state, issued), offer)

    def _check_clock(self, state: State) -> None:
        floor = datetime.fromisoformat(RELEASED).replace(tzinfo=UTC)
        if state.trusted_time is not None:
            floor = max(floor, datetime.fromisoformat(state.trusted_time) - CLOCK_SKEW)
        if self.clock() < floor:
            raise self._wrong_clock(floor)

    def _wrong_clock(self, floor: datetime) -> HostError:
        now = self.clock().isoformat(timespec="seconds")
        return HostError(
            "clock", f"a time after {floor.isoformat()}, which is known to be past", now, "set this device's clock"
        )

    def _trust_time(self, state: State, issued: datetime | None) -> State:
        """Remember the newest signed time of issue; it is written with the next change of the state.

        A time ahead of this clock is never kept: it would lock the device out of every update until then.
        """
        if issued is None:
            return state
        if issued - CLOCK_SKEW > self.clock():
            raise self._wrong_clock(issued - CLOCK_SKEW)
        if state.trusted_time is not None and issued <= datetime.fromisoformat(state.trusted_time):
            return state
        return replace(state, trusted_time=issued.isoformat())

    def _take(self, state: State, offer: Offer | None) -> Outcome:
        """Decide about the release that is offered."""
        wanted = offer is not None and state.refusal(offer.sha256) is None
        self._clean(state, offer.sha256 if offer is not None and wanted else None)
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
            self._clean(state)
            declined = serving is None or serving.sha256 != offer.sha256
            return Outcome("up_to_date", "rolled back here; the next release will be taken" if declined else "")
        self._check_offer(offer)
        if serving is not None and serving.sha256 == offer.sha256:  # the same bytes under a new seq
            self._confirm(state, Entry(offer.sha256, offer.seq), offer.rollback_of)
            return Outcome("updated", "the same payload, signed again")
        self._stage(offer)
        pending = state.pending
        if pending is None or pending.sha256 != offer.sha256:
            pending = Pending(offer.sha256, offer.seq)
        return self._try(state, replace(pending, seq=offer.seq, rollback_of=offer.rollback_of))

    def _clean(self, state: State, downloading: str | None = None) -> None:
        """Delete what neither the state nor the release at hand needs; nothing, where the state could not be read."""
        if state.readable:
            self.store.clean(state.named, downloading)

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
        most = self.settings.max_payload_bytes
        if not 0 < offer.length <= most:
            raise UpdateError(
                where, f"at most {int(most)} bytes, as device.json says", offer.length, "publish a smaller payload"
            )

    # how ----------------------------------------------------------------------------------------------------------

    def _stage(self, offer: Offer) -> None:
        """Have the offered payload here, whole and durable, whatever was there before."""
        if self.store.read(offer.sha256) is not None or self._waits(offer.sha256):
            return
        if self._patch(offer):
            return
        part = self.store.part(offer.sha256)
        for left in (1, 0):
            self._need_room(offer.sha256, offer.length)
            self.log.write(self.clock(), "download", seq=offer.seq, sha256=offer.sha256, bytes=offer.length)
            resumed = fetch(
                self.transport, offer.path, length=offer.length, part=part, disk=self.disk, sleep=self.sleep
            )
            try:
                self.store.verify_download(offer.sha256)
                return
            except UpdateError:
                if not (resumed and left):  # what lay here from before may be what is wrong: once more from the start
                    raise

    def _waits(self, sha256: str) -> bool:
        """Tell whether a payload is here that the state names: it was made durable before it was named."""
        pending = self.files.read().pending
        return pending is not None and pending.sha256 == sha256 and self.store.staged(sha256) is not None

    def _patch(self, offer: Offer) -> bool:
        """Make the offered payload from one that is here and a shorter download; tell whether that worked."""
        if offer.shortcut is None:
            return False
        from .offers import bring

        base, sha256, _, length = offer.shortcut
        self._need_room(offer.sha256, offer.length + length)
        self.log.write(self.clock(), "download", seq=offer.seq, sha256=sha256, bytes=length, base=base)
        return bring(offer, self.store, self.transport, self.disk, self.sleep)

    def _need_room(self, sha256: str, length: int) -> None:
        most = None if self.settings.max_disk_bytes is None else int(self.settings.max_disk_bytes)
        self.store.need_room(sha256, length, keep_free=int(self.settings.min_free_bytes or 0), most=most)

    def _try(self, state: State, pending: Pending) -> Outcome:
        """Give a staged payload its trial, counted on disk before it is loaded."""
        now = self.clock()
        if pending.retry_at is not None:
            wait = datetime.fromisoformat(pending.retry_at) - now
            if timedelta(0) < wait <= MAX_BACKOFF:  # a wait beyond the longest means that the clock was set back
                return self._waiting(pending)
        elif pending.trials and pending.trials % TRIALS == 0:
            due = now + min(MAX_BACKOFF, BACKOFF * 2 ** min(10, pending.trials // TRIALS - 1))
            pending = replace(pending, retry_at=due.isoformat(timespec="seconds"))
            self.files.write(replace(state, pending=pending))
            self.log.write(now, "pending", seq=pending.seq, sha256=pending.sha256, trials=pending.trials)
            return self._waiting(pending)
        pending = replace(pending, trials=pending.trials + 1, retry_at=None)
        state = self.files.write(replace(state, pending=pending))
        self.log.write(now, "trial", seq=pending.seq, sha256=pending.sha256, trials=pending.trials)
        data = self.store.staged(pending.sha256)
        if data is None:
            path = self.store.part(pending.sha256)
            raise HostError(path, "the payload that was just verified", "other bytes", "check this device's storage")
        try:
            self.trial(data)
            if self.settings.health_command:
                self._check_before(state.active)
        except PayloadError as e:
            self._refuse(state, pending, e)
            raise
        except NoVerdict as e:
            raise self._no_verdict(str(e)) from e
        return self._commit(state, pending)

    def _waiting(self, pending: Pending) -> Outcome:
        return Outcome("pending", f"no verdict in {pending.trials} trials; the next one is due {pending.retry_at}")

    def _no_verdict(self, why: str) -> HostError:
        return HostError("trial", "a verdict on the payload", why, "it is tried again with the next update")

    def _refuse(self, state: State, pending: Pending, error: PayloadError) -> None:
        state = self.files.write(state.refuse(pending.sha256, pending.seq, str(error)))
        self.log.write(self.clock(), "refused", seq=pending.seq, sha256=pending.sha256, reason=str(error))
        self.store.clean(state.named)

    def _commit(self, state: State, pending: Pending) -> Outcome:
        """Serve a payload that passed its trial: for good, or on probation first."""
        kept = {pending.sha256} | ({state.active.sha256} if state.active is not None else set())
        self.store.admit(pending.sha256, kept)
        entry = Entry(pending.sha256, pending.seq)
        if self.settings.health_command:
            return self._prove(state, entry, pending)
        self._confirm(state, entry, pending.rollback_of)
        return _taken(pending.rollback_of)

    def _confirm(self, state: State, entry: Entry, rollback_of: int | None) -> None:
        """Make a payload the active one. After this returns, the update is acknowledged and survives."""
        previous = state.active if state.active is not None and state.active.sha256 != entry.sha256 else state.previous
        if previous is not None and previous.sha256 == entry.sha256:
            previous = None
        state = self.files.write(
            replace(
                state, active=entry, previous=previous, pending=None, probation=None, declined=None,
                seq=max(state.seq, entry.seq), seq_sha256=entry.sha256,
            )
        )  # fmt: skip
        self.log.write(self.clock(), "active", seq=entry.seq, sha256=entry.sha256, rollback_of=rollback_of)
        self.store.clean(state.named)
        self.switched()

    # on probation -------------------------------------------------------------------------------------------------

    def _check_before(self, serving: Entry | None) -> None:
        """See that the device is well without the payload; where it is not, it says nothing about the payload."""
        try:
            self._check_health(serving)
        except PayloadError as e:
            raise NoVerdict(f"{e} already before the payload was activated") from e

    def _check_health(self, serving: Entry | None) -> None:
        environment = {
            "LRCOMPRESS_STATE": str(self.folder.absolute()),
            "LRCOMPRESS_SEQ": str(0 if serving is None else serving.seq),
            "LRCOMPRESS_SHA256": "" if serving is None else serving.sha256,
        }
        check_health(self.settings.health_command, self.settings.health_timeout_s, environment)

    def _prove(self, before: State, entry: Entry, pending: Pending) -> Outcome:
        """Serve `entry` while the operator's program says, again and again, that the device is well; then keep it or go back."""
        told = self.settings
        checks = max(1, round(told.probation_s / told.health_interval_s))
        # The window, and all the time that its checks may take: after that nobody can be watching any more.
        until = self.clock() + timedelta(seconds=told.probation_s + checks * (told.health_timeout_s + 1))
        probation = Probation(boot_id(), until.isoformat(), pending.trials, pending.rollback_of)
        state = self.files.write(
            replace(before, active=entry, previous=before.active, pending=None, probation=probation)
        )
        self.log.write(self.clock(), "probation", seq=entry.seq, sha256=entry.sha256, until=until.isoformat())
        self.switched()
        try:
            for _ in range(checks):  # counted, not timed: a clock that jumps shortens nothing
                self.sleep(told.probation_s / checks)
                self._check_health(entry)
        except PayloadError as e:
            back = replace(state, active=before.active, previous=None, probation=None)
            self._refuse(back, pending, e)
            self.switched()
            raise
        except NoVerdict as e:
            self.files.write(back_from_probation(state))
            self.log.write(self.clock(), "no_verdict", seq=entry.seq, sha256=entry.sha256, reason=str(e))
            self.switched()
            raise self._no_verdict(str(e)) from e
        self._confirm(replace(state, active=before.active, previous=None), entry, pending.rollback_of)
        return _taken(pending.rollback_of)


def _taken(rollback_of: int | None) -> Outcome:
    return Outcome("updated" if rollback_of is None else "rolled_back")


def back_from_probation(state: State) -> State:
    """Return the state in which the payload before serves again, and the one on probation waits for another trial."""
    if state.probation is None or state.active is None:
        return state
    tried = state.probation
    pending = Pending(state.active.sha256, state.active.seq, tried.trials, rollback_of=tried.rollback_of)
    return replace(state, active=state.previous, previous=None, pending=pending, probation=None)


def mend(files: StateFiles, store: Store, log: StatusLog, disk: Disk, now: datetime, folder: Path) -> State:
    """Take out of the state what is no longer whole and what nobody saw to the end, and delete what was never finished.

    Whatever a process left that was killed before it could sync it is made durable first: it is about to be told.
    """
    for place in (folder, folder / METADATA):
        disk.sync_folder(place)
    for place in (folder, folder / METADATA, folder / ROOTS):
        disk.sweep(place)
    state = files.read()
    if not state.readable:
        return state
    mended = back_from_probation(state)  # whoever watched over it is gone
    stored = {sha: store.read(sha) is not None for sha in mended.named}
    if mended.active is not None and not stored[mended.active.sha256]:
        log.write(now, "rotted", sha256=mended.active.sha256, seq=mended.active.seq)
        mended = replace(mended, active=mended.previous, previous=None)
    if mended.active is not None and not stored[mended.active.sha256]:
        mended = replace(mended, active=None)
    if mended.previous is not None and not stored[mended.previous.sha256]:
        mended = replace(mended, previous=None)
    # One that waits is kept, whole or not: the number of its trials must outlive its bytes.
    if mended != state:
        mended = files.write(mended)
    return mended


def describe_serving(entry: Entry | None) -> dict[str, Any]:
    """Return `serving` or `previous` of the JSON contract."""
    if entry is None:
        return {"kind": "factory", "sha256": None, "seq": 0}
    return {"kind": "payload", "sha256": entry.sha256, "seq": entry.seq}
