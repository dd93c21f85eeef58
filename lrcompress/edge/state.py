"""What a device remembers: two checksummed copies, of which a write replaces the older one.

    {"body": {...}, "sha256": sha256(canonical body)}        state.0 and state.1, the body with a growing generation

A reader takes the valid copy of the highest generation, so a write that was cut anywhere leaves the one before it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..files import canonical_json, sha256_json
from ..manifest import is_sha256, strict_json
from .disk import Disk

COPIES = ("state.0", "state.1")
#: Refused payloads that are remembered; the oldest are forgotten first (their `seq` is behind by then).
MAX_REFUSED = 64


@dataclass(frozen=True)
class Entry:
    """A payload in the store and the release that brought it."""

    sha256: str
    seq: int


@dataclass(frozen=True)
class Pending:
    """A staged payload that has no verdict yet. `trials` is counted on disk before each load."""

    sha256: str
    seq: int
    trials: int = 0
    retry_at: str | None = None
    rollback_of: int | None = None


@dataclass(frozen=True)
class Refused:
    """A payload that failed a check: never tried again."""

    sha256: str
    seq: int
    reason: str


@dataclass(frozen=True)
class State:
    """The memory of a device. `seq` is the newest release ever acknowledged; it never falls."""

    generation: int = 0
    seq: int = 0
    seq_sha256: str | None = None
    active: Entry | None = None
    previous: Entry | None = None
    pending: Pending | None = None
    declined: str | None = None
    refused: tuple[Refused, ...] = ()
    trusted_time: str | None = None
    #: False for the empty state that stands in when both copies are destroyed: then nothing may be deleted.
    readable: bool = field(default=True, compare=False)

    def refuse(self, sha256: str, seq: int, reason: str) -> State:
        """Return this state with a payload refused for good."""
        kept = [r for r in self.refused if r.sha256 != sha256]
        pending = None if self.pending is not None and self.pending.sha256 == sha256 else self.pending
        return replace(self, refused=(*kept, Refused(sha256, seq, reason))[-MAX_REFUSED:], pending=pending)

    def refusal(self, sha256: str) -> Refused | None:
        return next((r for r in self.refused if r.sha256 == sha256), None)

    @property
    def named(self) -> set[str]:
        """Every payload that must stay in the store."""
        return {e.sha256 for e in (self.active, self.previous, self.pending) if e is not None}


def encode(state: State) -> bytes:
    """Return the bytes of one copy."""
    body = asdict(state)
    del body["readable"]
    return canonical_json({"body": body, "sha256": sha256_json(body)}) + b"\n"


def decode(data: bytes) -> State | None:
    """Return the state in one copy; None if it is damaged in any way."""
    try:
        value = strict_json(data)
        body = value["body"]
        if value["sha256"] != sha256_json(body):
            return None
        return _state(body)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _state(body: dict[str, Any]) -> State:
    known = {f.name for f in fields(State)} - {"readable"}
    plain = {k: v for k, v in body.items() if k in known and k not in ("active", "previous", "pending", "refused")}
    active, previous = (None if body[k] is None else Entry(**body[k]) for k in ("active", "previous"))
    pending = None if body["pending"] is None else Pending(**body["pending"])
    found = State(
        **plain, active=active, previous=previous, pending=pending, refused=tuple(Refused(**r) for r in body["refused"])
    )
    whole = all(type(n) is int and n >= 0 for n in (found.generation, found.seq))
    if not whole or not all(map(is_sha256, found.named)):
        raise ValueError("not a state")
    return found


class StateFiles:
    """The two copies in one folder."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        self._folder, self._disk = folder, disk

    def _copies(self) -> list[State | None]:
        found = []
        for name in COPIES:
            try:
                found.append(decode((self._folder / name).read_bytes()))
            except OSError:
                found.append(None)
        return found

    def read(self) -> State:
        """Return the newest valid copy, or an empty state that is marked as not readable."""
        valid = [s for s in self._copies() if s is not None]
        return max(valid, key=lambda s: s.generation) if valid else State(readable=False)

    def write(self, state: State) -> State:
        """Make `state` durable over the older copy; return it with its new generation. Only then may anyone be told."""
        copies = self._copies()
        ages = [-1 if s is None else s.generation for s in copies]
        state = replace(state, generation=max(*ages, state.generation) + 1, readable=True)
        temporary = self._folder / "state.tmp"
        self._disk.write(temporary, encode(state))
        self._disk.sync(temporary)
        self._disk.rename(temporary, self._folder / COPIES[ages.index(min(ages))])
        self._disk.sync_folder(self._folder)
        return state
