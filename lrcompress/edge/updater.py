"""One update, from the signed metadata to a verdict that is on disk before anyone is told.

    IDLE → CHECK → DOWNLOAD → VERIFY → STAGED → TRIAL → (PROBATION) → ACTIVE | REFUSED (a check failed: never again)
                                                                             | PENDING (no verdict: again, then after a growing while)

Every arrow can be cut by a loss of power: the state files name only what is durable, and the next call goes on. What a
payload must be before it serves is spread over the arrows: signature and `seq` (CHECK), length and hash (VERIFY),
slots, shapes, numbers, answers and latency (TRIAL), the operator's own program (PROBATION). A base that a release brings
goes the same way beside its payload, and the two are served, kept and given up together. One machine, one file; how bytes
come is in `staging`, what a killed process left in `mending`.
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
from ..manifest import version_key
from .bases import Base, Bases, Wanted
from .disk import Disk
from .folder import METADATA
from .health import boot_id, check_health
from .log import StatusLog
from .mending import back_from_probation, mend
from .settings import Settings
from .staging import BadPack, Staging, tidy
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
    bases: Bases
    log: StatusLog
    disk: Disk
    settings: Settings
    #: Returns the trial of a payload on a base; the second one serves now, where that is another.
    trial: Callable[[Base, Base | None], Trial]
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
            now = self.clock()
            return self._run(mend(self.files, self.store, self.bases, self.log, self.disk, now, self.folder))
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
                self.folder / METADATA, self.root, self.transport, model=self.bases.factory.manifest.model,
                group=self.group, disk=self.disk, now=self.clock(), sleep=self.sleep, have=state.named,
                bases=self.bases.ids(state.bases),
                device=None if self.identity is None else self.identity.id,
                channel="stable" if self.identity is None else self.identity.channel,
            )  # fmt: skip
        except DownloadError:
            waits = state.pending
            if waits is None or self.store.staged(waits.sha256) is None or self._base(waits.base) is None:
                raise
            return self._try(state, waits)  # staged and trusted already: needs no network
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
        refusal = None if offer is None else state.refusal(offer.sha256, offer.tried_with)
        tidy(self.store, self.bases, state, None if refusal else offer)
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
        if refusal is not None:
            self._save_time(state)
            raise _refused(offer, refusal.reason)
        serving = state.active
        if offer.seq == state.seq and (
            state.declined == offer.sha256 or (serving is not None and serving.sha256 == offer.sha256)
        ):
            self._save_time(state)
            tidy(self.store, self.bases, state)
            declined = serving is None or serving.sha256 != offer.sha256
            return Outcome("up_to_date", "rolled back here; the next release will be taken" if declined else "")
        self._check_offer(offer)
        base = self.bases.choose(offer.base_ids, state.bases, offer.base)
        if base is None or (isinstance(base, Wanted) and not (offer.base and offer.base.ways)):
            return self._wait_for_base(state, offer)
        if base.name is not None and (refusal := state.refusal(offer.sha256, [base.name])) is not None:
            raise _refused(offer, refusal.reason)
        entry = Entry(offer.sha256, offer.seq, base.name)
        if serving is not None and (serving.sha256, serving.base) == (entry.sha256, entry.base):
            self._confirm(state, entry, offer.rollback_of)  # the same bytes under a new seq
            return Outcome("updated", "the same payload, signed again")
        try:
            Staging(
                self.store, self.bases, self.disk, self.log, self.settings, self.transport, self.clock, self.sleep
            ).bring(offer, base, state)
        except BadPack as e:
            self._refuse(state, Pending(offer.sha256, offer.seq, base=e.pack), e)
            raise
        pending = state.pending
        if pending is None or (pending.sha256, pending.base) != (entry.sha256, entry.base):
            pending = Pending(offer.sha256, offer.seq, base=entry.base)
        return self._try(state, replace(pending, seq=offer.seq, rollback_of=offer.rollback_of))

    def _wait_for_base(self, state: State, offer: Offer) -> Outcome:
        """Leave a release alone that is for a base to which nothing leads from here: it is not bad, and may get its turn."""
        self._save_time(state)
        here = ", ".join(i[:16] for i in self.bases.ids(state.bases))
        reason = (
            f"waiting: release seq {offer.seq} is for base {', '.join(i[:16] for i in offer.base_ids)}, here is {here}"
        )
        self.log.write(self.clock(), "waiting", seq=offer.seq, sha256=offer.sha256, base_ids=list(offer.base_ids))
        return Outcome("pending", reason)

    def _base(self, name: str | None) -> Base | None:
        return self.bases.find(name, staged=True)

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
        data, base = self.store.staged(pending.sha256), self._base(pending.base)
        if data is None or base is None:
            path = self.store.part(pending.sha256)
            raise HostError(path, "the payload that was just verified", "other bytes", "check this device's storage")
        try:
            serving = None if state.active is None else state.active.base
            before = None if base.name in (None, serving) else self.bases.find(serving) or self.bases.factory
            self.trial(base, before)(data)
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
        state = self.files.write(state.refuse(pending.sha256, pending.seq, str(error), pending.base))
        self.log.write(self.clock(), "refused", seq=pending.seq, sha256=pending.sha256, reason=str(error))
        tidy(self.store, self.bases, state)

    def _commit(self, state: State, pending: Pending) -> Outcome:
        """Serve a payload that passed its trial: for good, or on probation first."""
        entry, serving = pending.entry, state.active
        if entry.base is not None and entry.base not in [e.base for e in (serving, state.previous) if e is not None]:
            self.bases.admit(entry.base, {serving.base} if serving is not None and serving.base is not None else set())
        self.store.admit(entry.sha256, {entry.sha256} | ({serving.sha256} if serving is not None else set()))
        if self.settings.health_command:
            return self._prove(state, entry, pending)
        self._confirm(state, entry, pending.rollback_of)
        return _taken(pending.rollback_of)

    def _confirm(self, state: State, entry: Entry, rollback_of: int | None) -> None:
        """Make a payload the active one. After this returns, the update is acknowledged and survives."""
        same = [
            state.active is None or _same(state.active, entry),
            state.previous is None or _same(state.previous, entry),
        ]
        previous = state.active if not same[0] else state.previous if not same[1] else None
        state = self.files.write(
            replace(
                state, active=entry, previous=previous, pending=None, probation=None, declined=None,
                seq=max(state.seq, entry.seq), seq_sha256=entry.sha256,
            )
        )  # fmt: skip
        self.log.write(self.clock(), "active", seq=entry.seq, sha256=entry.sha256, rollback_of=rollback_of)
        tidy(self.store, self.bases, state)
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


def _same(a: Entry, b: Entry) -> bool:
    """Tell whether two releases are served alike."""
    return (a.sha256, a.base) == (b.sha256, b.base)


def _refused(offer: Offer, reason: str) -> PayloadError:
    return PayloadError(
        f"release seq {offer.seq}",
        "a payload that passes its checks",
        reason,
        "the publisher repairs it and publishes again",
    )


def _taken(rollback_of: int | None) -> Outcome:
    return Outcome("updated" if rollback_of is None else "rolled_back")


def describe_serving(entry: Entry | None) -> dict[str, Any]:
    """Return `serving` or `previous` of the JSON contract."""
    if entry is None:
        return {"kind": "factory", "sha256": None, "seq": 0}
    return {"kind": "payload", "sha256": entry.sha256, "seq": entry.seq}
