"""What a device does first: take out of its state what is no longer whole, and what nobody saw to the end."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path

from .bases import Bases
from .disk import Disk
from .folder import METADATA, ROOTS
from .log import StatusLog
from .state import Entry, Pending, State, StateFiles
from .store import Store


def back_from_probation(state: State) -> State:
    """Return the state in which the payload before serves again, and the one on probation waits for another trial."""
    if state.probation is None or state.active is None:
        return state
    tried = state.probation
    on = state.active
    pending = Pending(on.sha256, on.seq, tried.trials, rollback_of=tried.rollback_of, base=on.base)
    return replace(state, active=state.previous, previous=None, pending=pending, probation=None)


def mend(
    files: StateFiles, store: Store, bases: Bases, log: StatusLog, disk: Disk, now: datetime, folder: Path
) -> State:
    """Take out of the state what is no longer whole and what nobody saw to the end, and delete what was never finished.

    Whatever a process left that was killed before it could sync it is made durable first: it is about to be told.
    """
    for place in (folder, folder / METADATA):
        disk.sync_folder(place)
    for place in (folder, folder / METADATA, folder / ROOTS):
        disk.sweep(place)
    state = files.read()
    mended = back_from_probation(state)  # whoever watched over it is gone

    def whole(entry: Entry | None) -> bool:
        return entry is None or (store.read(entry.sha256) is not None and bases.find(entry.base) is not None)

    if mended.active is not None and not whole(mended.active):
        log.write(now, "rotted", sha256=mended.active.sha256, seq=mended.active.seq)
        mended = replace(mended, active=mended.previous, previous=None)
    if not whole(mended.active):
        mended = replace(mended, active=None)
    if not whole(mended.previous):
        mended = replace(mended, previous=None)
    # One that waits is kept, whole or not: the number of its trials must outlive its bytes.
    if mended != state:
        mended = files.write(mended)
    return mended
