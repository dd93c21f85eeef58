"""Releases: an adapter or payload goes in, a signed record comes out; a rollback is a new record for old bytes.

add(repo, "adapters/first", group="default", passphrase=p)
rollback(repo, 1, group="default", passphrase=p)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tuf.api.metadata import TargetFile

from .. import payload as payloads
from .._version import __version__
from ..errors import CommandError, PayloadError
from ..files import sha256_bytes, sha256_file
from ..golden import compare, load_golden, project
from ..manifest import GOLDEN, Manifest, load_limits
from ..payload import Payload
from ..runtime import Session
from .keys import KeyStore
from .repository import Repository, check_group, create, now

#: How far an encoding may move a golden output from what the f32 payload answers, relative to max(1, max|output|).
ENCODING_TOLERANCE = 1e-2
ENCODINGS = ("int8", "f16", "f32")


def init_repository(
    repo: str | Path, exported: str | Path, keys: str | Path | None = None, *, passphrase: str
) -> dict[str, Any]:
    """Make a repository for an exported model; keys go to `keys` (default REPO.keys beside it)."""
    folder = Path(repo)
    place = Path(keys) if keys is not None else folder.parent / f"{folder.name}.keys"
    found = create(folder, Path(exported), place, passphrase=passphrase)
    return {
        "repository": str(folder),
        "model": found.model,
        "root": str(folder / "metadata" / "1.root.json"),
        "keys": str(place),
    }


def add(
    repo: str | Path, source: str | Path, *, group: str = "default", encoding: str = "auto", passphrase: str
) -> dict[str, Any]:
    """Publish `source` (an adapter folder or a payload file) to `group`; return seq, hash, sizes and encoding.

    `encoding` auto keeps the smallest that answers like f32. Raises `PayloadError` for what does not fit the base.
    """
    if encoding not in ("auto", *ENCODINGS):
        raise CommandError("lrcompress publish add --encoding", f"auto, {', '.join(ENCODINGS)}", encoding)
    check_group(group)
    repository = Repository(Path(repo))
    keys = KeyStore(repository.keys_folder, passphrase)
    with repository.locked():
        manifest = Manifest.load(repository.exported)
        if manifest.model != repository.model:
            raise PayloadError(
                repository.exported, f"the model {repository.model}", manifest.model, "this repository serves one model"
            )
        kind, tensors = _tensors(Path(source), manifest)
        data, chosen, sizes = _smallest(repository.exported, manifest, kind, tensors, encoding)
        limit = load_limits(repository.exported)["max_payload_bytes"]
        if len(data) > limit:
            raise PayloadError(
                source, f"at most {int(limit)} bytes, as device.json says", len(data), "use a smaller rank or encoding"
            )
        before = repository.latest(group)
        custom = _record(manifest, sha256_bytes(data), 1 if before is None else before.seq + 1, kind, chosen)
        target = TargetFile(len(data), {"sha256": custom["sha256"]}, repository.target_path(group))
        repository.publish(keys, group, data, target, custom)
        return _report(repository, group, custom, len(data)) | {"encoding": chosen, "sizes": sizes}


def rollback(repo: str | Path, to_seq: int, *, group: str = "default", passphrase: str) -> dict[str, Any]:
    """Sign a new release of `group` that points at the bytes of release `to_seq`."""
    check_group(group)
    repository = Repository(Path(repo))
    keys = KeyStore(repository.keys_folder, passphrase)
    with repository.locked():
        history = {r.seq: r for r in repository.history(group)}
        current = max(history.values(), key=lambda r: r.seq)
        old = history.get(to_seq)
        if old is None:
            raise CommandError(
                "lrcompress publish rollback --to",
                f"a seq of group {group}: {', '.join(map(str, sorted(history)))}",
                to_seq,
            )
        if old.custom["sha256"] == current.custom["sha256"]:
            raise CommandError(
                "lrcompress publish rollback --to",
                "a release other than what is served",
                f"seq {to_seq}, which is the same payload",
            )
        file = repository.payload_file(group, old.custom["sha256"])
        if not file.is_file() or sha256_file(file) != old.custom["sha256"]:
            raise PayloadError(
                file, "the payload of that release", "it is gone or changed", "publish it again with 'add'"
            )
        custom = {
            **old.custom,
            "seq": current.seq + 1,
            "rollback_of": current.seq,
            "issued": now().isoformat(),
            "min_version": __version__,
        }
        target = TargetFile(old.target.length, dict(old.target.hashes), repository.target_path(group))
        repository.publish(keys, group, None, target, custom)
        return _report(repository, group, custom, old.target.length)


def refresh(repo: str | Path, *, passphrase: str) -> dict[str, Any]:
    """Sign snapshot and timestamp again, so that they do not expire."""
    repository = Repository(Path(repo))
    with repository.locked():
        repository.refresh(KeyStore(repository.keys_folder, passphrase))
    return status(repo)


def status(repo: str | Path) -> dict[str, Any]:
    """Return the releases of every group and when what expires."""
    repository = Repository(Path(repo))
    groups = []
    for group in repository.groups():
        history = repository.history(group)
        releases = [
            {
                **{k: r.custom.get(k) for k in ("seq", "sha256", "kind", "encoding", "issued", "rollback_of")},
                "bytes": r.target.length,
            }
            for r in history
        ]
        groups.append({"group": group, "seq": history[-1].seq, "releases": releases})
    roles = ["root", "targets", "snapshot", "timestamp", *repository.groups()]
    expires = {role: repository.read(role).signed.expires.isoformat() for role in roles}
    return {"repository": str(repository.folder), "model": repository.model, "groups": groups, "expires": expires}


def _report(repository: Repository, group: str, custom: Mapping[str, Any], payload_bytes: int) -> dict[str, Any]:
    roles = [group, "snapshot", "timestamp"]
    names = ["timestamp.json" if r == "timestamp" else f"{repository.version(r)}.{r}.json" for r in roles]
    metadata = sum((repository.metadata / n).stat().st_size for n in names)
    return {
        "group": group, "seq": custom["seq"], "sha256": custom["sha256"], "rollback_of": custom.get("rollback_of"),
        "payload_bytes": payload_bytes, "metadata_bytes": metadata, "target": repository.target_path(group),
    }  # fmt: skip


def _record(manifest: Manifest, sha256: str, seq: int, kind: str, encoding: str) -> dict[str, Any]:
    return {
        "seq": seq, "sha256": sha256, "base_ids": [manifest.base_id], "kind": kind, "encoding": encoding,
        "min_version": __version__, "issued": now().isoformat(),
    }  # fmt: skip


def _tensors(source: Path, manifest: Manifest) -> tuple[str, dict[str, np.ndarray]]:
    """Return kind and exact slot tensors of an adapter folder or a payload file."""
    if source.is_dir():
        from ..export.payloads import payload_tensors

        return payload_tensors(source, manifest)
    try:
        found = payloads.parse(source.read_bytes())
    except OSError as e:
        raise PayloadError(source, "an adapter folder or a payload file", e.strerror or str(e)) from e
    found.verify(manifest)
    return found.kind, dict(found.tensors)


def _smallest(
    exported: Path, manifest: Manifest, kind: str, tensors: Mapping[str, np.ndarray], encoding: str
) -> tuple[bytes, str, dict[str, int]]:
    """Return the payload, its encoding, and the sizes of all that were tried.

    Golden outputs are computed from what a device will decode; an encoding that moves them too far is not taken.
    """
    golden = load_golden(exported / GOLDEN)
    session = Session(exported, threads=1, manifest=manifest, verify=False)

    def answers(data: bytes) -> Mapping[str, np.ndarray]:
        session.swap(payloads.parse(data))
        return session.run(golden.inputs)

    reference = answers(payloads.build(tensors, manifest=manifest, kind=kind, encoding="f32"))
    sizes: dict[str, int] = {}
    best: tuple[bytes, str] | None = None
    for name in ENCODINGS if encoding == "auto" else (encoding,):
        bare = payloads.build(tensors, manifest=manifest, kind=kind, encoding=name)
        outputs = answers(bare)
        budget = max(1024, len(bare) // 10)
        data = payloads.build(
            tensors, manifest=manifest, kind=kind, encoding=name, golden=project(outputs, budget // 2)
        )
        sizes[name] = len(data)
        faithful = compare(reference, outputs, ENCODING_TOLERANCE).passed
        if best is None and (faithful or name == "f32"):
            best = data, name
        elif encoding == name and not faithful:
            raise PayloadError(
                f"--encoding {name}",
                f"golden outputs within {ENCODING_TOLERANCE:.0%} of the f32 payload's",
                "further away",
                "use f16 or auto",
            )
    assert best is not None
    return (*best, sizes)


__all__ = ["ENCODINGS", "Payload", "add", "init_repository", "refresh", "rollback", "status"]
