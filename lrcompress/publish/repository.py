"""A TUF repository as plain files, changed one consistent step at a time.

    REPO/metadata/1.root.json, N.targets.json, N.<group>.json, N.snapshot.json, timestamp.json
    REPO/targets/<model>/<group>/<sha256>.payload.safetensors      target path <model>/<group>/payload.safetensors
    REPO/targets/<model>/<group>/<sha256>.candidate.safetensors    of a rollout that has not reached everybody
    REPO/targets/<model>/<group>/<sha256>.<from>-<to>.delta        from a payload that devices may have
    REPO/publisher.json                                            where this publisher's keys and artifact are

Every change writes what it points at before what points: payload, group role, targets, snapshot, timestamp. A kill in
between leaves the old timestamp, and so the old, whole state; the next change overwrites what nobody could see.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from securesystemslib.exceptions import StorageError, UnsupportedLibraryError
from securesystemslib.signer import Signer
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Role,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
)
from tuf.api.serialization.json import JSONSerializer

from ..errors import CommandError, DeviceStateError, UpdateError
from ..files import disk_errors, fsync_folder, sha256_bytes, write_atomic
from ..manifest import is_safe_name
from ..phases import CANDIDATE, PLACES, STABLE
from . import memory
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
TARGET = STABLE
_SERIALIZER = JSONSerializer(compact=True)


def now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


@dataclass(frozen=True)
class Release:
    """One signed release of a group: its target and its custom record."""

    target: TargetFile
    custom: dict[str, Any]
    channel: str = "stable"

    @property
    def seq(self) -> int:
        return int(self.custom["seq"])

    @property
    def sha256(self) -> str:
        return str(self.custom["sha256"])

    @property
    def percent(self) -> float | None:
        """The share of stable devices that a candidate is for; None for a release for everybody."""
        places = self.custom.get("places")
        return None if places is None else places * 100 / PLACES


@dataclass
class Change:
    """What a signature of a group shall say from now on: targets by name below <model>/<group>/, and their bytes."""

    put: dict[str, TargetFile] = field(default_factory=dict)
    drop: Callable[[str], bool] = lambda name: False
    files: dict[str, bytes] = field(default_factory=dict)

    def add(self, name: str, data: bytes, custom: Mapping[str, Any]) -> None:
        """Have the target `name` be these bytes."""
        self.files[name] = data
        self.point(name, len(data), sha256_bytes(data), custom)

    def point(self, name: str, length: int, sha256: str, custom: Mapping[str, Any]) -> None:
        """Have the target `name` be a file that is there already."""
        self.put[name] = TargetFile(length, {"sha256": sha256}, name)
        self.put[name].unrecognized_fields["custom"] = dict(custom)


class Repository:
    """An opened repository. Methods that sign take the key store; one publisher at a time (`locked`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            config = json.loads((folder / CONFIG).read_text())
            if config["made_by"] != MAKER:
                raise KeyError("made_by")
            self.config: dict[str, Any] = config
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
    def locked(self, *, older: bool = False) -> Iterator[None]:
        """Hold the repository against a second publisher; raise `DeviceStateError` if one is at work.

        Raises `UpdateError` for an older copy of what was published from here, unless `older`.
        """
        with disk_errors(self.folder), open(self.folder / ".lock", "w") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise DeviceStateError(
                    self.folder, "one publisher at a time", "another one is at work", "try again when it is done"
                ) from e
            places = [self.metadata, self.folder / "targets", self.keys_folder]
            for left in [p for place in places for p in place.rglob(".*.tmp")]:
                left.unlink(missing_ok=True)  # of a publisher that was killed
            if not older:
                self._check_memory()
            yield

    # reading ------------------------------------------------------------------------------------------------------

    def file(self, role: str, version: int | None = None) -> Path:
        """Return where a role's metadata are."""
        name = "timestamp.json" if role == "timestamp" else f"{version or self.version(role)}.{role}.json"
        return self.metadata / name

    def read(self, role: str, version: int | None = None) -> Metadata[Any]:
        """Return the current (or a given) version of a role's metadata."""
        path = self.file(role, version)
        try:
            return Metadata.from_file(str(path))
        except (OSError, StorageError, RepositoryError, ValueError) as e:
            raise UpdateError(path, f"the {role} metadata", str(e), "restore the repository from a copy") from e

    def version(self, role: str) -> int:
        """Return the version of a role that the current timestamp leads to."""
        if role == "timestamp":
            return int(self.read("timestamp").signed.version)
        if role == "root":
            return self.roots()[-1]
        if role == "snapshot":
            return int(self.read("timestamp").signed.snapshot_meta.version)
        meta = self.read("snapshot").signed.meta
        if f"{role}.json" not in meta:
            raise CommandError(
                self.folder, f"a group that has a release ({', '.join(self.groups()) or 'none yet'})", role
            )
        return int(meta[f"{role}.json"].version)

    def roots(self) -> list[int]:
        """Return the versions of the root, oldest first."""
        names = [p.name.partition(".")[0] for p in self.metadata.glob("*.root.json")]
        found = sorted(int(n) for n in names if n.isdecimal())
        if not found:
            raise UpdateError(self.metadata, "1.root.json", "none", "restore the repository from a copy")
        return found

    def groups(self) -> list[str]:
        meta = self.read("snapshot").signed.meta
        return sorted(name.removesuffix(".json") for name in meta if name != "targets.json")

    def roles(self) -> list[str]:
        """Return every role that has metadata, those of the groups last."""
        return [*ROLES, *self.groups()]

    def role(self, name: str) -> Role:
        """Return who may sign for a role, as its delegator says today."""
        if name in ROLES:
            found: Role = self.read("root").signed.roles[name]
            return found
        delegations = self.read("targets").signed.delegations
        roles = {} if delegations is None else delegations.roles or {}
        if name not in roles:
            raise CommandError(self.folder, f"a role ({', '.join(self.roles())})", name)
        found = roles[name]
        assert isinstance(found, Role)
        return found

    def target_path(self, group: str, name: str = TARGET) -> str:
        return f"{self.model}/{group}/{name}"

    def latest(self, group: str) -> Release | None:
        """Return the release of a group that everybody gets; None before its first."""
        return self.releases(group).get(STABLE)

    def candidate(self, group: str) -> Release | None:
        """Return the release that is being rolled out, if one is."""
        return self.releases(group).get(CANDIDATE)

    def releases(self, group: str, version: int | None = None) -> dict[str, Release]:
        """Return what one version of a group's metadata (the current one) offers: stable, candidate, or both."""
        if version is None and group not in self.groups():
            return {}
        targets = self.read(group, version).signed.targets
        found = {}
        for name, channel in ((STABLE, "stable"), (CANDIDATE, "canary")):
            target = targets.get(self.target_path(group, name))
            if target is not None and target.custom:
                found[name] = Release(target, target.custom, channel)
        return found

    def history(self, group: str) -> list[Release]:
        """Return all releases of a group that are still on record, oldest first, each seq once."""
        found = dict[int, Release]()
        for release in self.on_record(group):
            found.setdefault(release.seq, release)
        return [found[s] for s in sorted(found)]

    def on_record(self, group: str) -> Iterator[Release]:
        """Yield what every version of a group's metadata that is still there offers, the oldest first."""
        current = self.version(group)
        for version in range(1, current + 1):
            if version == current or self.file(group, version).exists():  # prune takes old ones away
                yield from self.releases(group, version).values()

    def payload_file(self, group: str, sha256: str, name: str = TARGET) -> Path:
        return self.folder / "targets" / self.model / group / f"{sha256}.{name}"

    def lifetime(self, role: str) -> timedelta:
        """Return how long a signature of a role holds."""
        kind = role if role in EXPIRY else "group"
        days = self.config.get("expiry_days", {}).get(kind)
        return EXPIRY[kind] if days is None else timedelta(days=days)

    def memory(self) -> dict[str, int]:
        """Return the newest versions that were published from here, and of each group's seq (see `memory`)."""
        return memory.load(self.keys_folder, self.model)

    def _check_memory(self) -> None:
        roles = self.roles()
        memory.check(self.folder, self.memory(), {r: self.version(r) for r in roles})

    def _remember(self) -> None:
        found = {r: self.version(r) for r in self.roles()}
        for group in self.groups():
            seqs = [r.seq for r in self.releases(group).values() if "seq" in r.custom]
            found[memory.SEQ + group] = max(seqs, default=0)
        memory.save(self.keys_folder, self.model, found)

    # writing ------------------------------------------------------------------------------------------------------

    def publish(
        self, keys: KeyStore, group: str, data: bytes | None, target: TargetFile, custom: dict[str, Any]
    ) -> None:
        """Sign one release for everybody in `group`; `data` None re-uses a payload that is there."""
        change = Change()
        change.point(TARGET, target.length, target.hashes["sha256"], custom)
        if data is not None:
            change.files[TARGET] = data
        self.apply(keys, group, change)

    def apply(self, keys: KeyStore, group: str, change: Change) -> None:
        """Sign a change of `group` and everything above it."""
        check_group(group)
        known = group in self.groups()
        # A lost key or a wrong passphrase shows before anything is written, or a new key is made with it.
        for role in ("snapshot", "timestamp", group if known else "targets"):
            self.signers(keys, role)
        self.check_expiry([r for r in ("root", "targets") if known or r != "targets"])
        for name, data in change.files.items():
            self._store(self.payload_file(group, change.put[name].hashes["sha256"], name), data)
        snapshot = self.read("snapshot").signed
        if known:
            signed = self.read(group).signed
            signed.version += 1
        else:
            signed = Targets()
            self._delegate(keys, group, snapshot)
        prefix = self.target_path(group, "")
        for path in [p for p in signed.targets if change.drop(p.removeprefix(prefix))]:
            del signed.targets[path]
        for name, target in change.put.items():
            target.path = self.target_path(group, name)
            signed.targets[target.path] = target
        self.write(keys, group, signed, None if known else [keys.load(group)])
        snapshot.meta[f"{group}.json"] = MetaFile(version=signed.version)
        self.seal(keys, snapshot)

    def check_expiry(self, roles: Sequence[str]) -> None:
        """Raise `UpdateError` for an expired role that would not be signed again: clients would refuse the rest, too."""
        for role in roles:
            expires = self.read(role).signed.expires
            if expires.replace(tzinfo=UTC) <= now():
                raise UpdateError(
                    self.file(role), f"a signature of {role} that has not expired", f"one that ended {expires.isoformat()}",
                    f"bring the {role} key and run 'lrcompress publish refresh'",
                )  # fmt: skip

    def _store(self, file: Path, data: bytes) -> None:
        with disk_errors(file):
            for folder in reversed([f for f in file.parents if not f.exists()]):
                folder.mkdir(exist_ok=True)
                fsync_folder(folder.parent)
        write_atomic(file, data)

    def _delegate(self, keys: KeyStore, group: str, snapshot: Snapshot) -> None:
        targets: Targets = self.read("targets").signed
        # The key of a group whose first release was interrupted is used again.
        key = (keys.load(group) if keys.path(group).exists() else keys.create(group)).public_key
        delegations = targets.delegations or Delegations(keys={}, roles={})
        assert delegations.roles is not None
        delegations.keys[key.keyid] = key
        paths = [f"{self.model}/{group}/*"]
        delegations.roles[group] = DelegatedRole(group, [key.keyid], 1, True, paths=paths)
        targets.delegations = delegations
        targets.version += 1
        self.write(keys, "targets", targets)
        snapshot.meta["targets.json"] = MetaFile(version=targets.version)

    def seal(
        self, keys: KeyStore, snapshot: Snapshot | None, extra: Mapping[str, Sequence[Signer]] | None = None
    ) -> None:
        """Sign a snapshot (None: the one there is stays) and the timestamp that makes it seen."""
        extra, timestamp, known = extra or {}, self.read("timestamp").signed, self.memory()
        if snapshot is not None:
            snapshot.version = max(timestamp.snapshot_meta.version, known.get("snapshot", 0)) + 1
            self.write(keys, "snapshot", snapshot, extra=extra.get("snapshot", ()))
            timestamp.snapshot_meta = MetaFile(version=snapshot.version)
        timestamp.version = max(timestamp.version, known.get("timestamp", 0)) + 1
        timestamp.unrecognized_fields["issued"] = now().isoformat()
        self.write(keys, "timestamp", timestamp, extra=extra.get("timestamp", ()))
        self._remember()

    def signers(self, keys: KeyStore, role: str) -> list[Signer]:
        """Return who signs for a role. Raises `UpdateError` where they are fewer than its threshold."""
        about = self.role(role)
        return keys.enough(role, about.keyids, about.threshold)

    def write(
        self,
        keys: KeyStore,
        name: str,
        signed: Signed,
        signers: Sequence[Signer] | None = None,
        *,
        extra: Sequence[Signer] = (),
    ) -> None:
        """Sign and write a role's metadata: by `signers`, else by those its delegator names; `extra` sign as well."""
        if signers is None:
            about = self.role(name)
            # Where keys change, those that are lost are no obstacle: whoever changes them has said so.
            signers = list(keys.signers(name, about.keyids)) if extra else self.signers(keys, name)
        put_metadata(self.metadata, name, signed, [*signers, *extra], self.lifetime(name))


def put_metadata(folder: Path, name: str, signed: Signed, signers: Sequence[Signer], lifetime: timedelta) -> None:
    """Sign and write one file of metadata."""
    signed.expires = now() + lifetime
    metadata: Metadata[Any] = Metadata(signed)
    for signer in signers:
        try:
            metadata.sign(signer, append=True)
        except (RepositoryError, UnsupportedLibraryError, ValueError, OSError) as e:
            raise UpdateError(f"signature of {name}", "a key that signs", f"{type(e).__name__}: {e}") from e
    file = "timestamp.json" if name == "timestamp" else f"{signed.version}.{name}.json"
    write_atomic(folder / file, metadata.to_bytes(_SERIALIZER))


def check_group(group: str) -> None:
    if not is_safe_name(group) or group in ROLES:
        raise CommandError("--group", f"a name of a-z, 0-9, '.', '_', '-' other than {', '.join(ROLES)}", group)
