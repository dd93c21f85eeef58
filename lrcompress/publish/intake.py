"""What devices report: signed records, checked one by one, in one SQLite file that any number of receivers share.

intake = Intake("repo.fleet.db")
intake.enroll(identity)                    # the public half of a device's identity, by the publisher's hand
intake.take(body)                          # Refusal for anything that is not the next true word of a known device
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from securesystemslib.exceptions import UnverifiedSignatureError, VerificationError
from securesystemslib.signer import Signature, SSlibKey

from ..errors import CommandError, DeviceStateError, HostError
from ..files import canonical_json, sha256_bytes
from ..manifest import is_safe_name, is_sha256, strict_json
from ..phases import CHANNELS
from .rollouts import Report

MAX_RECORD_BYTES = 16 << 10
#: A device's clock may be so far ahead of ours.
SKEW = timedelta(minutes=10)
_SCHEMA = """
create table if not exists devices (
  id text primary key, public text not null, grp text not null, channel text not null, enrolled text not null,
  revoked integer not null default 0, counter integer not null default 0, received text, at text, record text,
  reports integer not null default 0, failures integer not null default 0, bytes integer not null default 0,
  requests integer not null default 0) strict;
create table if not exists refusals (reason text primary key, n integer not null, last text not null) strict;
"""
_KEYS = {
    "schema", "device", "counter", "at", "model", "group", "channel", "base_id", "version", "serving", "refused", "state",
    "reason", "bytes", "requests", "ms", "healthy",
}  # fmt: skip


class Refusal(Exception):
    """A record that is not taken: `status` for the wire, `kind` for the count, one line for whoever sent it."""

    def __init__(self, status: int, kind: str, line: str) -> None:
        super().__init__(line)
        self.status, self.kind = status, kind


class Intake:
    """The database of one fleet."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self._open() as db:
            db.executescript("pragma journal_mode = wal;" + _SCHEMA)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
            try:
                db.execute("pragma synchronous = normal")
                yield db
            finally:
                db.close()
        except sqlite3.OperationalError as e:
            raise HostError(self.path, "a database that can be written", e, "check space and permissions") from e
        except sqlite3.DatabaseError as e:
            raise DeviceStateError(
                self.path, "a fleet's database (SQLite)", e, "restore it, or name another with --db"
            ) from e

    # devices ------------------------------------------------------------------------------------------------------

    def enroll(
        self, identity: str | Path | Mapping[str, Any], *, group: str | None = None, channel: str | None = None
    ) -> dict[str, Any]:
        """Know a device from now on, by `identity.json`, the folder that holds it, or its content. Enrolling again changes group and channel."""
        about = identity if isinstance(identity, Mapping) else _identity(Path(identity))
        try:
            public = bytes.fromhex(str(about["public"]))
            known = sha256_bytes(public)[:32]
            group, channel = str(group or about["group"]), str(channel or about["channel"])
            if len(public) != 32 or about["id"] != known:
                raise ValueError("id and key do not belong together")
            if not is_safe_name(group) or channel not in CHANNELS:
                raise ValueError(f"group {group!r}, channel {channel!r}")
        except (KeyError, TypeError, ValueError) as e:
            raise CommandError(
                "lrcompress publish enroll", "the identity.json of a device", e, "see 'lrcompress device init'"
            ) from e
        row = (known, public.hex(), group, channel, _now().isoformat())
        with self._open() as db:
            db.execute(
                "insert into devices (id, public, grp, channel, enrolled) values (?, ?, ?, ?, ?)"
                " on conflict (id) do update set grp = excluded.grp, channel = excluded.channel, revoked = 0",
                row,
            )
        return {"device": known, "group": group, "channel": channel}

    def expel(self, device: str) -> dict[str, Any]:
        """Take no more records of a device. Raises `CommandError` for one that is not known."""
        with self._open() as db:
            if db.execute("update devices set revoked = 1 where id = ?", (device,)).rowcount != 1:
                raise CommandError("lrcompress publish enroll --remove", "the id of an enrolled device", device)
        return {"device": device, "revoked": True}

    def devices(self, group: str | None = None) -> list[dict[str, Any]]:
        """Return every enrolled device with its last record."""
        with self._open() as db:
            db.row_factory = sqlite3.Row
            rows = db.execute("select * from devices where revoked = 0 order by grp, id").fetchall()
        found = [
            {**dict(r), "group": r["grp"], "record": None if r["record"] is None else json.loads(r["record"])}
            for r in rows
        ]
        return [d for d in found if group is None or d["group"] == group]

    def reports(self, group: str) -> list[Report]:
        """Return what a rollout is decided by."""
        found = []
        for d in self.devices(group):
            record = d["record"] or {}
            refused = frozenset(r["sha256"] for r in record.get("refused", ()))
            serving = (record.get("serving") or {}).get("sha256")
            found.append(Report(d["id"], d["channel"], serving, refused, bool(record.get("healthy", True))))
        return found

    def refusals(self) -> dict[str, int]:
        """Return how many records were refused, by kind."""
        with self._open() as db:
            return dict(db.execute("select reason, n from refusals order by reason").fetchall())

    # records ------------------------------------------------------------------------------------------------------

    def take(self, body: bytes, *, now: datetime | None = None) -> dict[str, Any]:
        """Check and keep one record. Raises `Refusal`, and counts it."""
        now = now or _now()
        try:
            return self._take(body, now)
        except Refusal as e:
            with self._open() as db:
                db.execute(
                    "insert into refusals values (?, 1, ?) on conflict (reason) do update set n = n + 1, last = excluded.last",
                    (e.kind, now.isoformat()),
                )
            raise

    def _take(self, body: bytes, now: datetime) -> dict[str, Any]:
        record, signature = _parse(body)
        with self._open() as db:
            row = db.execute("select public, revoked, grp from devices where id = ?", (record["device"],)).fetchone()
            if row is None or row[1]:
                raise Refusal(
                    403, "unknown device", f"device {record['device']} is not enrolled: 'lrcompress publish enroll'"
                )
            key = SSlibKey(record["device"], "ed25519", "ed25519", {"public": row[0]})
            try:
                key.verify_signature(Signature(record["device"], signature), canonical_json(record))
            except (UnverifiedSignatureError, VerificationError, ValueError):
                raise Refusal(403, "bad signature", "the record is not signed by the key of its device") from None
            at = datetime.fromisoformat(record["at"])
            if at > now + SKEW:
                raise Refusal(
                    422,
                    "from the future",
                    f"the record is of {record['at']}, now is {now.isoformat()}: set the device's clock",
                )
            if record["group"] != row[2]:
                raise Refusal(
                    422, "another group", f"device of group {row[2]}, record of {record['group']}: enroll it anew"
                )
            failed = not record["healthy"] or record["state"] in ("rejected", "failed")
            changed = db.execute(
                "update devices set counter = ?, received = ?, at = ?, record = ?, reports = reports + 1, failures = failures + ?,"
                " bytes = bytes + ?, requests = requests + ? where id = ? and counter < ?",
                (record["counter"], now.isoformat(), record["at"], json.dumps(record), int(failed), record["bytes"], record["requests"],
                 record["device"], record["counter"]),
            ).rowcount  # fmt: skip
        if changed != 1:
            raise Refusal(409, "replay", f"a record after number {record['counter']} is here already")
        return record


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _identity(path: Path) -> dict[str, Any]:
    path = path / "identity.json" if path.is_dir() else path
    try:
        value = strict_json(path.read_bytes())
    except (OSError, ValueError) as e:
        raise CommandError(
            "lrcompress publish enroll",
            "the identity.json of a device, or its folder",
            f"{path}: {e}",
            "see 'lrcompress device init'",
        ) from e
    return value if isinstance(value, dict) else {}


def _parse(body: bytes) -> tuple[dict[str, Any], str]:
    """Return record and signature (hex) of a body that has the form. Raises `Refusal`."""

    def need(good: object, what: str) -> None:
        if not good:
            raise Refusal(400, "malformed", f"a signed status record: {what}")

    if len(body) > MAX_RECORD_BYTES:
        raise Refusal(413, "too large", f"at most {MAX_RECORD_BYTES} bytes")
    try:
        value = strict_json(body.decode())
    except (ValueError, RecursionError):
        value = None
    need(isinstance(value, dict) and set(value) == {"record", "signature"}, "an object of record and signature")
    record, signature = value["record"], value["signature"]
    need(
        isinstance(signature, str) and len(signature) == 128 and set(signature) <= set("0123456789abcdef"), "signature"
    )
    need(isinstance(record, dict) and set(record) == _KEYS and record["schema"] == 1, "the fields of schema 1")
    for name in ("counter", "bytes", "requests"):
        need(type(record[name]) is int and 0 <= record[name] < 1 << 62, name)
    texts = ("device", "at", "model", "group", "channel", "base_id", "version", "reason")
    need(all(isinstance(record[n], str) and len(record[n]) <= 400 for n in texts), "texts")
    need(record["state"] is None or isinstance(record["state"], str), "state")
    need(type(record["healthy"]) is bool and isinstance(record["ms"], int | float), "healthy, ms")
    serving, refused = record["serving"], record["refused"]
    need(isinstance(serving, dict) and (serving.get("sha256") is None or is_sha256(serving["sha256"])), "serving")
    need(serving.get("seq") is None or type(serving["seq"]) is int, "serving.seq")
    need(
        isinstance(refused, list) and all(isinstance(r, dict) and is_sha256(r.get("sha256")) for r in refused),
        "refused",
    )
    try:
        need(datetime.fromisoformat(record["at"]).tzinfo is not None, "at, with its zone")
        canonical_json(record)
    except ValueError:
        need(False, "at, and text that is UTF-8")
    return record, signature
