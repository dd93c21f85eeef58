"""What a repository needs while it stands: fresh signatures, other keys, less of the past.

refresh(repo, passphrase=p)                        # from cron: what would expire soon is signed again
rotate_keys(repo, ["timestamp"], passphrase=p)
revoke(repo, keyid, passphrase=p)
prune(repo, keep=3)

New keys sign beside the old ones first; then one file, the next root, makes them the ones that count. A kill at any
moment leaves a repository that clients accept, and the same command finishes the change.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, timedelta
from pathlib import Path
from typing import Any

from securesystemslib.signer import Signer
from tuf.api.metadata import MetaFile, Root

from ..errors import CommandError, LrcompressWarning, UpdateError
from ..files import disk_errors
from .keys import ROLES, KeyStore
from .repository import Repository, now, put_metadata

#: A role is signed again when less than this share of its lifetime is left.
FRESH = 0.5


def refresh(repo: str | Path, *, passphrase: str, keys: Sequence[Path] = (), recover: bool = False) -> dict[str, Any]:
    """Sign again what would expire: the timestamp always, the rest in the second half of its life, if its key is here.

    A key that is not here is no error until its role is about to expire: a root key may be in a safe. `recover` makes an
    older copy of the repository one that devices accept again, by versions above all that they may have seen.
    """
    repository = Repository(Path(repo))
    store = KeyStore(repository.keys_folder, passphrase, keys)
    with repository.locked(older=recover):
        for role in ("snapshot", "timestamp"):
            repository.signers(store, role)
        known = repository.memory() if recover else {}
        snapshot, renewed, missing = repository.read("snapshot").signed, [], []
        for role in ("root", "targets", *repository.groups()):
            signed = repository.read(role).signed
            left = signed.expires.replace(tzinfo=UTC) - now()
            behind = known.get(role, 0) > signed.version
            if behind and role == "root":
                raise UpdateError(
                    repository.folder,
                    f"root {known[role]}, which devices have seen",
                    signed.version,
                    "restore its file",
                )
            if left > repository.lifetime(role) * FRESH and not behind:
                continue
            try:
                repository.signers(store, role)
            except UpdateError as e:
                if behind:
                    raise
                missing.append(role)
                days = max(0, left.days)
                warnings.warn(f"{role} expires in {days} days, and was not signed again: {e}", LrcompressWarning, 2)
                continue
            signed.version = max(signed.version, known.get(role, 0) if role != "root" else 0) + 1
            repository.write(store, role, signed)
            if role != "root":
                snapshot.meta[f"{role}.json"] = MetaFile(version=signed.version)
            renewed.append(role)
        repository.seal(store, snapshot)
    from .releases import status

    return {**status(repo), "renewed": [*renewed, "snapshot", "timestamp"], "keys_missing": missing}


def rotate_keys(
    repo: str | Path, roles: Sequence[str] = (), *, passphrase: str, keys: Sequence[Path] = ()
) -> dict[str, Any]:
    """Replace all keys of `roles` (none: of every role but root) by new ones. Old key files stay where they are."""
    repository = Repository(Path(repo))
    store = KeyStore(repository.keys_folder, passphrase, keys)
    with repository.locked():
        wanted = list(roles) or [r for r in repository.roles() if r != "root"]
        change = {r: (set(repository.role(r).keyids), len(repository.role(r).keyids)) for r in wanted}
        return _rekey(repository, store, change)


def revoke(repo: str | Path, key: str, *, passphrase: str, keys: Sequence[Path] = ()) -> dict[str, Any]:
    """Take a key out of every role that names it; where too few would be left, new ones take its place.

    `key` is a keyid, or enough of its beginning. Raises `CommandError` for a key that no role names.
    """
    repository = Repository(Path(repo))
    store = KeyStore(repository.keys_folder, passphrase, keys)
    with repository.locked():
        known = {k: r for r in repository.roles() for k in repository.role(r).keyids}
        found = {k for k in known if len(key) >= 8 and k.startswith(key)}
        if len(found) != 1:
            listed = ", ".join(f"{r} {k[:12]}" for k, r in known.items())
            raise CommandError("lrcompress publish revoke --key", f"one keyid of {listed}", key)
        change: dict[str, tuple[set[str], int]] = {}
        for name in repository.roles():
            role = repository.role(name)
            if gone := found & set(role.keyids):
                left = len(role.keyids) - len(gone)
                change[name] = (gone, max(0, role.threshold - left))
        return {**_rekey(repository, store, change), "revoked": sorted(found)}


def _rekey(repository: Repository, store: KeyStore, change: Mapping[str, tuple[set[str], int]]) -> dict[str, Any]:
    """Take keys out of roles and bring new ones in; `change`: role -> (keyids to go, how many to come)."""
    top = [r for r in change if r in ROLES]
    groups = [r for r in change if r not in ROLES]
    if top:
        repository.signers(store, "root")
    if groups:
        repository.signers(store, "targets")
    for role in ("snapshot", "timestamp"):
        if role not in change:
            repository.signers(store, role)
    for role in {*top} - {"root"}:
        about = repository.role(role)
        if len(list(store.signers(role, about.keyids))) < about.threshold:
            text = f"{role}: its old keys are not here; until this command ends, a client that looks will have to look again"
            warnings.warn(text, LrcompressWarning, 3)
    new = {role: store.prepare(role, count) for role, (_, count) in change.items()}
    _sign_beside(repository, store, change, new)
    if top:
        root: Root = repository.read("root").signed
        old = repository.signers(store, "root")
        for role in top:
            for keyid in change[role][0]:
                root.revoke_key(keyid, role)
            for signer in new[role]:
                root.add_key(signer.public_key, role)
        root.version += 1
        kept = {s.public_key.keyid: s for s in [*old, *new.get("root", [])]}
        put_metadata(repository.metadata, "root", root, list(kept.values()), repository.lifetime("root"))
    for role in change:
        store.settle(role)
    return {
        "repository": str(repository.folder),
        "roles": {r: {"removed": sorted(change[r][0]), "keys": list(repository.role(r).keyids)} for r in change},
        "root_version": repository.version("root"),
    }


def _sign_beside(
    repository: Repository,
    store: KeyStore,
    change: Mapping[str, tuple[set[str], int]],
    new: Mapping[str, Sequence[Signer]],
) -> None:
    """Sign what is there with the keys of before and of after; a group's new keys count at once, by its delegator's word."""
    snapshot = repository.read("snapshot").signed
    groups = [r for r in change if r not in ROLES]
    if groups or "targets" in change:
        targets = repository.read("targets").signed
        for group in groups:
            role = targets.delegations.roles[group]
            for keyid in change[group][0]:
                role.keyids.remove(keyid)
                if not any(keyid in r.keyids for r in targets.delegations.roles.values()):
                    del targets.delegations.keys[keyid]
            for signer in new[group]:
                role.keyids.append(signer.public_key.keyid)
                targets.delegations.keys[signer.public_key.keyid] = signer.public_key
            signed = repository.read(group).signed
            signed.version += 1
            signers = store.enough(group, role.keyids, role.threshold)
            put_metadata(repository.metadata, group, signed, signers, repository.lifetime(group))
            snapshot.meta[f"{group}.json"] = MetaFile(version=signed.version)
        targets.version += 1
        repository.write(store, "targets", targets, extra=new.get("targets", ()))
        snapshot.meta["targets.json"] = MetaFile(version=targets.version)
    repository.seal(store, snapshot, new)


def prune(repo: str | Path, *, keep: int = 3) -> dict[str, Any]:
    """Delete what no client can ask for any more, but the last `keep` releases of each group.

    Roots stay: a device that was off for a year walks all of them. So does what the snapshot before this one names,
    for a client that is reading now.
    """
    if keep < 1:
        raise CommandError("lrcompress publish prune --keep", "at least 1", keep)
    repository = Repository(Path(repo))
    with repository.locked():
        version = repository.version("snapshot")
        metadata = {repository.file("timestamp")} | set(repository.metadata.glob("*.root.json"))
        payloads: set[Path] = set()
        for v in {version, max(1, version - 1)}:
            path = repository.file("snapshot", v)
            if path.exists():
                metadata.add(path)
                for name, meta in repository.read("snapshot", v).signed.meta.items():
                    metadata.add(repository.file(name.removesuffix(".json"), meta.version))
        for group in repository.groups():
            wanted = {r.seq for r in repository.history(group)[-keep:]}
            for v in range(1, repository.version(group) + 1):
                path = repository.file(group, v)
                if path.exists() and wanted & {r.seq for r in repository.releases(group, v).values()}:
                    metadata.add(path)
                    wanted -= {r.seq for r in repository.releases(group, v).values()}
        for path in metadata:
            role = path.name.removesuffix(".json").partition(".")[2]
            if role not in (*ROLES, "") and path.exists():
                for target_path, target in repository.read(
                    role, int(path.name.partition(".")[0])
                ).signed.targets.items():
                    folder, _, name = target_path.rpartition("/")
                    payloads.add(repository.folder / "targets" / folder / f"{target.hashes['sha256']}.{name}")
        there = [
            *repository.metadata.glob("*.json"),
            *(p for p in (repository.folder / "targets").rglob("*") if p.is_file()),
        ]
        gone = [p for p in there if p not in metadata and p not in payloads]
        freed = sum(p.stat().st_size for p in gone)
        with disk_errors(repository.folder):
            for path in gone:
                path.unlink()
    return {"repository": str(repository.folder), "deleted": len(gone), "bytes": freed, "kept": len(there) - len(gone)}


def expiries(repository: Repository) -> list[dict[str, Any]]:
    """Return when the signature of each role ends, the first first."""
    found = []
    for role in repository.roles():
        at = repository.read(role).signed.expires.replace(tzinfo=UTC)
        days = (at - now()) // timedelta(days=1)
        found.append({"role": role, "at": at.isoformat(), "days": days, "keys": list(repository.role(role).keyids)})
    return sorted(found, key=lambda e: str(e["at"]))
