"""What a device remembers: two checksummed copies, of which a write replaces the older one.

    {"body": {...}, "sha256": sha256(canonical body)}        state.0 and state.1, the body with a growing generation

A reader takes the valid copy of the highest generation, so a write that was cut anywhere leaves the one before it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ..files import canonical_json, sha256_json
from ..manifest import is_sha256, strict_json
from .disk import Disk

COPIES = ("state.0", "state.1")
#: Refused payloads that are remembered; the oldest are forgotten first (their `seq` is behind by then).
MAX_REFUSED = 64
#: Characters of a reason that are kept: what is written on every change must not grow.
MAX_REASON = 200
#: A state is a few kB; nothing larger is read.
MAX_STATE_BYTES = 1 << 20


@dataclass(frozen=True)
class Entry:
    """A payload in the store, the release that brought it, and the base that it is served on: None is the factory's."""

    sha256: str
    seq: int
    base: str | None = None


@dataclass(frozen=True)
class Pending:
    """A staged payload that has no verdict yet. `trials` is counted on disk before each load."""

    sha256: str
    seq: int
    trials: int = 0
    retry_at: str | None = None
    rollback_of: int | None = None
    base: str | None = None

    @property
    def entry(self) -> Entry:
        return Entry(self.sha256, self.seq, self.base)


@dataclass(frozen=True)
class Probation:
    """The active payload passed its trial and has yet to prove itself in use: it is served in this boot, until then."""

    boot: str
    until: str
    trials: int
    rollback_of: int | None = None


@dataclass(frozen=True)
class Refused:
    """A payload that failed a check, on a base or with a pack: never tried again with that."""

    sha256: str
    seq: int
    reason: str
    base: str | None = None


@dataclass(frozen=True)
class State:
    """The memory of a device. `seq` is the newest release ever acknowledged; it never falls."""

    generation: int = 0
    seq: int = 0
    seq_sha256: str | None = None
    active: Entry | None = None
    previous: Entry | None = None
    pending: Pending | None = None
    probation: Probation | None = None
    declined: str | None = None
    refused: tuple[Refused, ...] = ()
    trusted_time: str | None = None
    #: False for the empty state that stands in when both copies are destroyed: then nothing may be deleted.
    readable: bool = field(default=True, compare=False)

    def refuse(self, sha256: str, seq: int, reason: str, base: str | None = None) -> State:
        """Return this state with a payload refused for good; `base`: what it was refused with, if not the factory's."""
        kept = [r for r in self.refused if (r.sha256, r.base) != (sha256, base)]
        pending = None if self.pending is not None and self.pending.sha256 == sha256 else self.pending
        refused = (*kept, Refused(sha256, seq, reason[:MAX_REASON], base))[-MAX_REFUSED:]
        return replace(self, refused=refused, pending=pending)

    def refusal(self, sha256: str, bases: Collection[str] = ()) -> Refused | None:
        """Return how a payload was refused, with the factory's base or one of `bases` (bases or packs)."""
        return next((r for r in self.refused if r.sha256 == sha256 and (r.base is None or r.base in bases)), None)

    @property
    def named(self) -> set[str]:
        """Every payload that must stay in the store."""
        return {e.sha256 for e in (self.active, self.previous, self.pending) if e is not None}

    @property
    def bases(self) -> set[str]:
        """Every base beside the factory's that must stay."""
        return {e.base for e in (self.active, self.previous, self.pending) if e is not None and e.base is not None}


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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _state(body: Any) -> State:
    """Return the state that `body` holds. Raises for anything that `encode` would not have written."""
    named = {"active": Entry, "previous": Entry, "pending": Pending, "probation": Probation}
    known = {f.name for f in fields(State)} - {"readable"}
    plain: dict[str, Any] = {k: body[k] for k in known & body.keys() if k not in named and k != "refused"}
    parts: dict[str, Any] = {k: None if body.get(k) is None else _record(kind, body[k]) for k, kind in named.items()}
    refused = tuple(_record(Refused, r) for r in body["refused"])
    found = State(**plain, **parts, refused=refused)
    texts = (found.seq_sha256, found.declined)
    _need(_count(found.generation) and _count(found.seq) and len(refused) <= MAX_REFUSED)
    _need(all(t is None or is_sha256(t) for t in texts) and _time(found.trusted_time))
    _need(found.probation is None or found.active is not None)
    return found


def _record(kind: type[Any], value: Any) -> Any:
    """Return a part of the state, each field of the type that it declares; a field that is not known is left out."""
    made = kind(**{f.name: value[f.name] for f in fields(kind) if f.name in value})
    for f in fields(kind):
        v = getattr(made, f.name)
        if f.name == "sha256":
            _need(is_sha256(v))
        elif f.name == "base":
            _need(v is None or is_sha256(v))
        elif f.name in ("retry_at", "until"):
            _need(_time(v))
        elif f.type == "str":
            _need(isinstance(v, str))
        else:
            _need(_count(v) or (v is None and "None" in str(f.type)))
    return made


def _need(good: object) -> None:
    if not good:
        raise ValueError("not a state")


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _time(value: object) -> bool:
    """Tell whether `value` is None or a time with its zone; raises for text that is no time."""
    return value is None or (isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None)


class StateFiles:
    """The two copies in one folder."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        self._folder, self._disk = folder, disk

    def _copies(self) -> list[State | None]:
        found = []
        for name in COPIES:
            try:
                found.append(decode(self._disk.read(self._folder / name, MAX_STATE_BYTES)))
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
        self._disk.replace(self._folder / COPIES[ages.index(min(ages))], encode(state))
        self._disk.sync_folder(self._folder)
        return state
