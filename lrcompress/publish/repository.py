"""A TUF repository as plain files, changed one consistent step at a time.

    REPO/metadata/1.root.json, N.targets.json, N.<group>.json, N.snapshot.json, timestamp.json
    REPO/targets/<model>/<group>/<sha256>.payload.safetensors      target path <model>/<group>/payload.safetensors
    REPO/publisher.json                                            where this publisher's keys and artifact are

Every change writes what it points at before what points: payload, group role, targets, snapshot, timestamp. A kill in
between leaves the old timestamp, and so the old, whole state; the next change overwrites what nobody could see.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Role,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from ..errors import CommandError, DeviceStateError, UpdateError
from ..files import write_atomic, write_json
from ..manifest import Manifest, is_safe_name
from .keys import ROLES, KeyStore

MAKER = "lrcompress publish"
CONFIG = "publisher.json"
EXPIRY = {
    "root": timedelta(days=365),
    "targets": timedelta(days=180),
    "group": timedelta(days=180),
    "snapshot": timedelta(days=180),
    "timestamp": timedelta(days=14),
}
TARGET = "payload.safetensors"
_SERIALIZER = JSONSerializer(compact=True)


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


@dataclass(frozen=True)
class Release:
    """One signed release of a group: its target and its custom record."""

    target: TargetFile
    custom: dict[str, Any]

    @property
    def seq(self) -> int:
        return int(self.custom["seq"])


class Repository:
    """An opened repository. Methods that sign take the key store; one publisher at a time (`locked`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            config = json.loads((folder / CONFIG).read_text())
            if config["made_by"] != MAKER:
                raise KeyError("made_by")
            self.model = str(config["model"])
            self.keys_folder = (folder / config["keys"]).resolve()
            self.exported = (folder / config["exported"]).resolve()
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise CommandError(
                folder, "a repository made by 'lrcompress publish init'", type(e).__name__, "make one first"
            ) from e

    @property
    def metadata(self) -> Path:
        return self.folder / "metadata"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the repository against a second publisher; raise `DeviceStateError` if one is at work."""
        with open(self.folder / ".lock", "w") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise DeviceStateError(
                    self.folder, "one publisher at a time", "another one is at work", "try again when it is done"
                ) from e
            yield

    # reading ------------------------------------------------------------------------------------------------------

    def read(self, role: str, version: int | None = None) -> Metadata[Any]:
        """Return the current (or a given) version of a role's metadata."""
        name = "timestamp.json" if role == "timestamp" else f"{version or self.version(role)}.{role}.json"
        try:
            return Metadata.from_file(str(self.metadata / name))
        except (OSError, RepositoryError, ValueError) as e:
            raise UpdateError(
                self.metadata / name, f"the {role} metadata", str(e), "restore the repository from a copy"
            ) from e

    def version(self, role: str) -> int:
        """Return the version of a role that the current timestamp leads to."""
        if role == "timestamp":
            return int(self.read("timestamp").signed.version)
        if role == "root":
            return max(int(p.name.partition(".")[0]) for p in self.metadata.glob("*.root.json"))
        if role == "snapshot":
            return int(self.read("timestamp").signed.snapshot_meta.version)
        meta = self.read("snapshot").signed.meta
        if f"{role}.json" not in meta:
            raise CommandError(
                self.folder, f"a group that has a release ({', '.join(self.groups()) or 'none yet'})", role
            )
        return int(meta[f"{role}.json"].version)

    def groups(self) -> list[str]:
        meta = self.read("snapshot").signed.meta
        return sorted(name.removesuffix(".json") for name in meta if name != "targets.json")

    def target_path(self, group: str) -> str:
        return f"{self.model}/{group}/{TARGET}"

    def latest(self, group: str) -> Release | None:
        """Return the current release of a group; None before its first."""
        return self._release(group, self.version(group)) if group in self.groups() else None

    def history(self, group: str) -> list[Release]:
        """Return all signed releases of a group, oldest first, each seq once."""
        found: dict[int, Release] = {}
        for version in range(1, self.version(group) + 1):
            release = self._release(group, version)
            if release is not None:
                found.setdefault(release.seq, release)
        return [found[s] for s in sorted(found)]

    def _release(self, group: str, version: int) -> Release | None:
        target = self.read(group, version).signed.targets.get(self.target_path(group))
        return None if target is None or not target.custom else Release(target, target.custom)

    def payload_file(self, group: str, sha256: str) -> Path:
        return self.folder / "targets" / self.model / group / f"{sha256}.{TARGET}"

    # writing ------------------------------------------------------------------------------------------------------

    def publish(
        self, keys: KeyStore, group: str, data: bytes | None, target: TargetFile, custom: dict[str, Any]
    ) -> None:
        """Sign a release of `group` and everything above it; `data` None re-uses a payload that is there."""
        check_group(group)
        known = group in self.groups()
        for role in ("snapshot", "timestamp", group if known else "targets"):
            keys.load(
                role
            )  # a lost key or a wrong passphrase shows before anything is written, or a new key is made with it
        sha = target.hashes["sha256"]
        if data is not None:
            file = self.payload_file(group, sha)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(file, data)
        target.unrecognized_fields["custom"] = custom
        snapshot = self.read("snapshot").signed
        if known:
            signed = self.read(group).signed
            signed.version += 1
        else:
            signed = Targets()
            self._delegate(keys, group, snapshot)
        signed.targets[self.target_path(group)] = target
        self._write(keys, group, signed, "group")
        snapshot.meta[f"{group}.json"] = MetaFile(version=signed.version)
        self._seal(keys, snapshot)

    def refresh(self, keys: KeyStore) -> None:
        """Sign a new snapshot and timestamp: what a nightly job does so that nothing expires."""
        self._seal(keys, self.read("snapshot").signed)

    def _delegate(self, keys: KeyStore, group: str, snapshot: Snapshot) -> None:
        targets: Targets = self.read("targets").signed
        signer = keys.load(group) if keys.path(group).exists() else keys.create(group)
        key = signer.public_key
        delegations = targets.delegations or Delegations(keys={}, roles={})
        assert delegations.roles is not None
        delegations.keys[key.keyid] = key
        delegations.roles[group] = DelegatedRole(group, [key.keyid], 1, True, paths=[f"{self.model}/{group}/*"])
        targets.delegations = delegations
        targets.version += 1
        self._write(keys, "targets", targets, "targets")
        snapshot.meta["targets.json"] = MetaFile(version=targets.version)

    def _seal(self, keys: KeyStore, snapshot: Snapshot) -> None:
        timestamp: Timestamp = self.read("timestamp").signed
        snapshot.version = timestamp.snapshot_meta.version + 1
        self._write(keys, "snapshot", snapshot, "snapshot")
        timestamp.snapshot_meta = MetaFile(version=snapshot.version)
        timestamp.version += 1
        timestamp.unrecognized_fields["issued"] = now().isoformat()
        self._write(keys, "timestamp", timestamp, "timestamp")

    def _write(self, keys: KeyStore, role: str, signed: Signed, lifetime: str) -> None:
        signed.expires = now() + EXPIRY[lifetime]
        metadata: Metadata[Any] = Metadata(signed)
        metadata.sign(keys.load(role))
        name = "timestamp.json" if role == "timestamp" else f"{signed.version}.{role}.json"
        write_atomic(self.metadata / name, metadata.to_bytes(_SERIALIZER))


def check_group(group: str) -> None:
    if not is_safe_name(group) or group in ROLES:
        raise CommandError("--group", f"a name of a-z, 0-9, '.', '_', '-' other than {', '.join(ROLES)}", group)


def create(folder: Path, exported: Path, keys: Path, *, passphrase: str) -> Repository:
    """Make a repository for the model in `exported`. Raises `CommandError` where something stands in the way."""
    manifest = Manifest.load(exported)
    if keys.resolve().is_relative_to(folder.resolve()):
        raise CommandError(
            "lrcompress publish init --keys",
            "a folder outside the repository",
            keys,
            "whoever serves REPO would serve the keys",
        )
    for place, what in ((folder, "repository"), (keys, "key")):
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise CommandError(
                place,
                f"a new or empty {what} folder",
                "something is there",
                "choose another place; keys and history are never replaced",
            )
    store = KeyStore(keys, passphrase)
    (folder / "metadata").mkdir(parents=True)
    (folder / "targets").mkdir()
    root = Root(consistent_snapshot=True)
    signers = {role: store.create(role) for role in ROLES}
    for role, signer in signers.items():
        root.add_key(signer.public_key, role)
        root.roles[role] = Role([signer.public_key.keyid], 1)
    snapshot = Snapshot()
    signed: list[tuple[str, Signed]] = [
        ("root", root),
        ("targets", Targets()),
        ("snapshot", snapshot),
        ("timestamp", Timestamp()),
    ]
    signed[-1][1].unrecognized_fields["issued"] = now().isoformat()
    for role, value in signed:
        value.expires = now() + EXPIRY[role]
        metadata: Metadata[Any] = Metadata(value)
        metadata.sign(signers[role])
        name = "timestamp.json" if role == "timestamp" else f"1.{role}.json"
        write_atomic(folder / "metadata" / name, metadata.to_bytes(_SERIALIZER))
    relative = {
        "keys": os.path.relpath(keys.resolve(), folder.resolve()),
        "exported": os.path.relpath(exported.resolve(), folder.resolve()),
    }
    write_json(folder / CONFIG, {"schema": 1, "made_by": MAKER, "model": manifest.model, **relative})
    return Repository(folder)
