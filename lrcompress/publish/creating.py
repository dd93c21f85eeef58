"""A new repository: its keys, its first root, and nothing half of either.

Both folders are built beside their places and renamed. Keys come first, marked as unused until the repository stands:
what a kill leaves in between belongs to nobody, and the next try may replace it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from securesystemslib.signer import Signer
from tuf.api.metadata import Role, Root, Signed, Snapshot, Targets, Timestamp

from ..errors import CommandError
from ..files import disk_errors, fsync_folder, staged_folder, write_atomic, write_json
from ..manifest import Manifest
from .bases import Index, index_file
from .keys import ROLES, KeyStore
from .repository import CONFIG, EXPIRY, MAKER, Repository, now, put_metadata

UNUSED = ".unused"


@dataclass(frozen=True)
class Setup:
    """How many keys each role has and how many of them must sign, who signs instead of a file, and for how long."""

    roles: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    signers: Sequence[tuple[str, str]] = ()
    expiry_days: Mapping[str, int] = field(default_factory=dict)

    def check(self) -> None:
        """Raise `CommandError` for what no repository can be."""
        for role, (threshold, count) in self.roles.items():
            if role not in ROLES or not 1 <= threshold <= count <= 20:
                raise CommandError(
                    "lrcompress publish init --role", f"ROLE=THRESHOLD/KEYS with a role of {', '.join(ROLES)} and 1 ≤ THRESHOLD ≤ KEYS ≤ 20", f"{role}={threshold}/{count}",
                )  # fmt: skip
        for role, days in self.expiry_days.items():
            if role not in EXPIRY or not 1 <= days <= 3650:
                raise CommandError(
                    "lrcompress publish init --expires", f"ROLE=DAYS with a role of {', '.join(EXPIRY)} and 1…3650 days", f"{role}={days}",
                )  # fmt: skip
        for role, uri in self.signers:
            if role not in ROLES:
                raise CommandError(
                    "lrcompress publish init --signer", f"ROLE=URI with a role of {', '.join(ROLES)}", f"{role}={uri}"
                )


def create(folder: Path, exported: Path, keys: Path, *, passphrase: str, setup: Setup | None = None) -> Repository:
    """Make a repository for the model in `exported`. Raises `CommandError` where something stands in the way."""
    setup = setup or Setup()
    setup.check()
    manifest = Manifest.load(exported)
    if keys.resolve().is_relative_to(folder.resolve()):
        raise CommandError(
            "lrcompress publish init --keys",
            "a folder outside the repository",
            keys,
            "whoever serves REPO would serve the keys",
        )
    abandoned = _abandoned(keys, folder)
    for place, what in ((folder, "repository"), (keys, "key")):
        if place.exists() and (not place.is_dir() or any(place.iterdir())) and not (place == keys and abandoned):
            raise CommandError(
                place,
                f"a new or empty {what} folder",
                "something is there",
                "choose another place; keys and history are never replaced",
            )
    KeyStore(keys, passphrase)
    signers = _make_keys(keys, folder, passphrase, setup)
    with staged_folder(folder, maker=MAKER, marker=CONFIG) as stage:
        _fill(stage, signers, setup)
        relative = {
            n: os.path.relpath(p.resolve(), folder.resolve()) for n, p in (("keys", keys), ("exported", exported))
        }
        about = {"schema": 1, "made_by": MAKER, "model": manifest.model, "expiry_days": dict(setup.expiry_days)}
        here = {"bases": [{"base_id": manifest.base_id, "exported": relative["exported"]}], "ports": manifest.ports}
        index = index_file(stage, manifest.base_id)
        index.parent.mkdir()
        write_atomic(index, Index.of(exported, manifest).to_bytes())
        write_json(stage / CONFIG, {**about, **relative, **here})
    with disk_errors(keys):
        (keys / UNUSED).unlink()
    return Repository(folder)


def _abandoned(keys: Path, folder: Path) -> bool:
    """Tell whether `keys` were made for a repository that never came to be."""
    try:
        return (keys / UNUSED).read_text() == str(folder.resolve()) and not folder.exists()
    except OSError:
        return False


def _make_keys(keys: Path, folder: Path, passphrase: str, setup: Setup) -> dict[str, list[Signer]]:
    with disk_errors(keys):
        keys.parent.mkdir(parents=True, exist_ok=True)
        stage = keys.parent / f".{keys.name}.stage"
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(mode=0o700)
        try:
            write_atomic(stage / UNUSED, str(folder.resolve()).encode())
            store, signers = KeyStore(stage, passphrase), {}
            for role in ROLES:
                given = [uri for r, uri in setup.signers if r == role]
                count = max(setup.roles.get(role, (1, 1))[1], len(given))
                found = []
                for number in range(1, count + 1):
                    if number <= len(given):
                        uri, _, public = given[number - 1].partition("#")
                        found.append(store.attach(role, number, uri, Path(public) if public else None))
                    else:
                        found.append(store.create(role, number))
                signers[role] = found
            if keys.exists():
                shutil.rmtree(keys)
            stage.rename(keys)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        fsync_folder(keys.parent)
    return signers


def _fill(stage: Path, signers: Mapping[str, Sequence[Signer]], setup: Setup) -> None:
    (stage / "metadata").mkdir()
    (stage / "targets").mkdir()
    root = Root(consistent_snapshot=True)
    for role, found in signers.items():
        for signer in found:
            root.add_key(signer.public_key, role)
        root.roles[role] = Role([s.public_key.keyid for s in found], setup.roles.get(role, (1, 1))[0])
    timestamp = Timestamp()
    timestamp.unrecognized_fields["issued"] = now().isoformat()
    signed: dict[str, Signed] = {"root": root, "targets": Targets(), "snapshot": Snapshot(), "timestamp": timestamp}
    for role, value in signed.items():
        days = setup.expiry_days.get(role)
        lifetime = EXPIRY[role] if days is None else EXPIRY[role].__class__(days=days)
        put_metadata(stage / "metadata", role, value, signers[role], lifetime)
