"""Releases: an adapter or payload goes in, a signed record comes out; a rollback is a new record for old bytes.

add(repo, "adapters/first", group="default", passphrase=p)
base(repo, "exported2", "adapters/second", group="default", passphrase=p)     # a new base model, and its payload
rollback(repo, 1, group="default", passphrase=p)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import payload as payloads
from .._version import __version__
from ..errors import CommandError, PayloadError
from ..files import sha256_bytes, sha256_file
from ..manifest import LIMITS, MANIFEST, Manifest, load_limits
from ..phases import CANDIDATE, CHANNELS, STABLE, delta_name
from . import bases
from .creating import Setup, create
from .encoding import Encoded, choose
from .keys import KeyStore
from .repository import Change, Release, Repository, check_group, now


def init_repository(
    repo: str | Path,
    exported: str | Path,
    keys: str | Path | None = None,
    *,
    passphrase: str,
    setup: Setup | None = None,
) -> dict[str, Any]:
    """Make a repository for an exported model; keys go to `keys` (default REPO.keys beside it)."""
    folder = Path(repo)
    place = Path(keys) if keys is not None else folder.parent / f"{folder.name}.keys"
    found = create(folder, Path(exported), place, passphrase=passphrase, setup=setup)
    return {
        "repository": str(folder),
        "model": found.model,
        "root": str(folder / "metadata" / "1.root.json"),
        "keys": str(place),
        "roles": {
            n: {"threshold": r.threshold, "keys": list(r.keyids)} for n, r in found.read("root").signed.roles.items()
        },
    }


def add(
    repo: str | Path,
    source: str | Path,
    *,
    group: str = "default",
    encoding: str = "auto",
    channel: str = "stable",
    passphrase: str,
    keys: Sequence[Path] = (),
) -> dict[str, Any]:
    """Publish `source` (an adapter folder or a payload file) to `group`; return seq, hash, sizes and encoding.

    `encoding` auto keeps the smallest that answers like f32, and deltas from what devices have where those save bytes.
    Channel `canary` offers it to the devices of that channel only, until `rollout` widens it. Raises `PayloadError` for
    what does not fit the base, `CommandError` while another release is being rolled out.
    """
    check_group(group)
    if channel not in CHANNELS:
        raise CommandError("lrcompress publish add --channel", " or ".join(CHANNELS), channel)
    repository = Repository(Path(repo))
    store = KeyStore(repository.keys_folder, passphrase, keys)
    with repository.locked():
        check_not_rolling(repository, group)
        folder, manifest = bases.current(repository, group)
        kind, tensors = _tensors(Path(source), manifest)
        encoded = choose(folder, manifest, kind, tensors, encoding, earlier(repository, group))
        _check_size(source, encoded, [folder])
        latest = repository.latest(group)
        brought = None if latest is None else latest.custom.get("base")
        custom = _record(manifest, encoded.sha256, next_seq(repository, group), kind, encoded.encoding, brought)
        change, custom = _offering(repository, group, encoded, custom, channel)
        repository.apply(store, group, change)
        return _told(repository, group, encoded, custom, channel)


def base(
    repo: str | Path,
    exported: str | Path,
    source: str | Path | None = None,
    *,
    group: str = "default",
    encoding: str = "auto",
    channel: str = "stable",
    passphrase: str,
    keys: Sequence[Path] = (),
) -> dict[str, Any]:
    """Publish the exported model `exported` to devices of `group`, as what is new of it, with `source` as its payload.

    Without a source the payload corrects nothing. Devices take both as one update, and go back from both as one; what
    `add` publishes from then on is for this base. Raises `CommandError` for the base that they have, `PayloadError` for
    one that their applications could not use.
    """
    check_group(group)
    if channel not in CHANNELS:
        raise CommandError("lrcompress publish base --channel", " or ".join(CHANNELS), channel)
    repository, folder = Repository(Path(repo)), Path(exported)
    store = KeyStore(repository.keys_folder, passphrase, keys)
    manifest = Manifest.load(folder)
    with repository.locked():
        check_not_rolling(repository, group)
        there = bases.starts(repository, group, manifest.base_id)
        bases.check_new(repository, group, manifest, folder)
        kind, tensors = nothing(manifest) if source is None else _tensors(Path(source), manifest)
        encoded = choose(folder, manifest, kind, tensors, encoding, earlier(repository, group))
        _check_size(source or folder, encoded, [folder, repository.exported])
        indexes = [found for b in there if (found := bases.Index.read(repository, b)) is not None]
        made = bases.make(folder, manifest, indexes)
        brought = bases.record((folder / MANIFEST).read_bytes(), manifest)
        custom = _record(manifest, encoded.sha256, next_seq(repository, group), kind, encoded.encoding, brought)
        bases.remember(repository, folder, bases.Index.of(folder, manifest))
        change, custom = _offering(repository, group, encoded, custom, channel, packs=made)
        repository.apply(store, group, change)
        before = there[0] if there else None
        pack, old = made.get(before, made[None]), next((i for i in indexes if i.base_id == before), None)
        constants, known = bases.tensors(folder), {} if old is None else old.known
        return _told(repository, group, encoded, custom, channel) | {
            "base": {
                "base_id": manifest.base_id, "before": before, "bytes": len(pack), "whole_bytes": len(made[None]),
                "unpacked_bytes": brought["bytes"], "from": [b for b in made if b is not None],
                "tensors": len(constants), "tensors_changed": sum(t not in known for t in constants),
            },
        }  # fmt: skip


def _check_size(source: object, encoded: Encoded, folders: Sequence[Path]) -> None:
    """Raise `PayloadError` for a payload that devices would refuse. They keep the limits that they were made with."""
    limit = min(load_limits(f)["max_payload_bytes"] for f in folders if (f / LIMITS).is_file())
    if len(encoded.data) > limit:
        raise PayloadError(
            source,
            f"at most {int(limit)} bytes, as device.json says",
            len(encoded.data),
            "use a smaller rank or encoding",
        )


def _offering(
    repository: Repository,
    group: str,
    encoded: Encoded,
    custom: dict[str, Any],
    channel: str,
    packs: Mapping[str | None, bytes] | None = None,
) -> tuple[Change, dict[str, Any]]:
    """Return the change that offers a payload, with what leads to it and to its base, and its record."""
    name, latest, stable = STABLE, repository.latest(group), channel == "stable"
    if not stable:
        name, custom = CANDIDATE, {**custom, "places": 0}
    change = Change(drop=stale_deltas(repository, group, stable=stable))
    change.add(name, encoded.data, custom)
    for start, delta in encoded.deltas.items():
        change.add(delta_name(start, encoded.sha256), delta, {"from": start, "to": encoded.sha256})
    if packs is not None:
        bases.add_packs(change, packs, custom["base"]["base_id"])
    bases.keep_packs(repository, group, change, custom, *([] if stable or latest is None else [latest.custom]))
    return change, custom


def _told(
    repository: Repository, group: str, encoded: Encoded, custom: Mapping[str, Any], channel: str
) -> dict[str, Any]:
    # What a device with the payload before this one fetches.
    shortest = next(iter(encoded.deltas.values()), encoded.data)
    return report(repository, group, custom, len(shortest)) | {
        "encoding": encoded.encoding if shortest is encoded.data else "delta",
        "whole": {"encoding": encoded.encoding, "bytes": len(encoded.data)},
        "sizes": encoded.sizes,
        "channel": channel,
    }


def rollback(
    repo: str | Path, to_seq: int, *, group: str = "default", passphrase: str, keys: Sequence[Path] = ()
) -> dict[str, Any]:
    """Sign a new release of `group` that points at the bytes of release `to_seq`; 0 is the model as delivered."""
    check_group(group)
    repository = Repository(Path(repo))
    store = KeyStore(repository.keys_folder, passphrase, keys)
    with repository.locked():
        check_not_rolling(repository, group)
        history = {r.seq: r for r in repository.history(group)}
        current = repository.latest(group)
        old = history.get(to_seq)
        if current is None or (old is None and to_seq != 0):
            raise CommandError(
                "lrcompress publish rollback --to",
                f"a seq of group {group}: {', '.join(map(str, sorted(history)))}, or 0 for the model as delivered",
                to_seq,
            )
        change, custom = back_to(repository, group, old, undone=current.seq, bring_first=True)
        if custom["sha256"] == current.sha256:
            raise CommandError(
                "lrcompress publish rollback --to",
                "a release other than what is served",
                f"seq {to_seq}, which is the same payload",
            )
        repository.apply(store, group, change)
        return report(repository, group, custom, change.put[STABLE].length)


def back_to(
    repository: Repository, group: str, old: Release | None, *, undone: int, bring_first: bool = False
) -> tuple[Change, dict[str, Any]]:
    """Return the change that offers an old release's bytes (None: a correction of rank 0) to everybody, and its record.

    With `bring_first` devices that were made with a later base can follow to the first one: packs of it are offered too,
    which is not worth their place in the metadata where a candidate is halted that nobody was made with.
    """
    change = Change(drop=lambda name: name == CANDIDATE or name.endswith(".delta"))
    seq = next_seq(repository, group)
    about = {"seq": seq, "rollback_of": undone, "issued": now().isoformat(), "min_version": __version__}
    if old is None:
        folder, manifest = bases.load(repository, bases.first(repository))
        encoded = choose(folder, manifest, *nothing(manifest), encoding="f32")
        custom = {**_record(manifest, encoded.sha256, seq, nothing(manifest)[0], "f32"), **about}
        custom = bases.bring_first(repository, group, change, custom) if bring_first else custom
        change.add(STABLE, encoded.data, custom)
        bases.keep_packs(repository, group, change, custom)
        return change, custom
    custom = {**old.custom, **about}
    custom = bases.bring_first(repository, group, change, custom) if bring_first else custom
    custom.pop("places", None)
    change.point(STABLE, old.target.length, old.sha256, custom)
    change.files.update(stable_bytes(repository, group, old))
    bases.keep_packs(repository, group, change, custom)
    return change, custom


def stable_bytes(repository: Repository, group: str, release: Release) -> dict[str, bytes]:
    """Return what must be written so that a release's bytes lie where everybody looks. Raises `PayloadError` if they are gone."""
    for name in (STABLE, CANDIDATE):
        file = repository.payload_file(group, release.sha256, name)
        if file.is_file() and sha256_file(file) == release.sha256:
            return {} if name == STABLE else {STABLE: file.read_bytes()}
    file = repository.payload_file(group, release.sha256)
    raise PayloadError(file, "the payload of that release", "it is gone or changed", "publish it again with 'add'")


def check_not_rolling(repository: Repository, group: str) -> None:
    """Raise `CommandError` while a release of the group is on its way."""
    candidate = repository.candidate(group)
    if candidate is not None:
        raise CommandError(
            f"group {group}", "no rollout under way", f"seq {candidate.seq} at {candidate.percent:g} %",
            "finish it ('publish rollout --percent 100') or halt it ('publish rollout --halt')",
        )  # fmt: skip


def next_seq(repository: Repository, group: str) -> int:
    """Return a seq above every one that the group ever had."""
    history = repository.history(group) if group in repository.groups() else []
    return 1 + max([repository.memory().get(f"seq:{group}", 0), *(r.seq for r in history)])


def earlier(repository: Repository, group: str, most: int = 2) -> list[bytes]:
    """Return the newest payloads of a group that devices may have, newest first."""
    found: dict[str, bytes] = {}
    for release in reversed(repository.history(group) if group in repository.groups() else []):
        for name in (STABLE, CANDIDATE):
            file = repository.payload_file(group, release.sha256, name)
            if len(found) < most and release.sha256 not in found and file.is_file():
                data = file.read_bytes()
                if sha256_bytes(data) == release.sha256:
                    found[release.sha256] = data
    return list(found.values())


def stale_deltas(repository: Repository, group: str, *, stable: bool) -> Callable[[str], bool]:
    """Return which targets a new release makes useless: all deltas, or those that do not lead to what everybody gets."""
    latest = repository.latest(group)
    keep = None if stable or latest is None else f"-{latest.sha256[:16]}.delta"
    return lambda name: name.endswith(".delta") and not (keep is not None and name.endswith(keep))


def nothing(manifest: Manifest) -> tuple[str, dict[str, np.ndarray]]:
    """Return kind and tensors of the correction that corrects nothing: the model as delivered."""
    from ..export.payloads import empty_tensors

    return empty_tensors(manifest)


def status(repo: str | Path) -> dict[str, Any]:
    """Return the releases of every group and when what expires."""
    repository = Repository(Path(repo))
    groups = []
    for group in repository.groups():
        history = repository.history(group)
        releases = [
            {
                **{k: r.custom.get(k) for k in ("seq", "sha256", "kind", "encoding", "issued", "rollback_of")},
                "base_id": next(iter(r.custom.get("base_ids") or ()), None),
                "bytes": r.target.length,
                "percent": r.percent,
            }
            for r in history
        ]
        groups.append({"group": group, "seq": history[-1].seq, "releases": releases})
    roles = ["root", "targets", "snapshot", "timestamp", *repository.groups()]
    expires = {role: repository.read(role).signed.expires.isoformat() for role in roles}
    return {"repository": str(repository.folder), "model": repository.model, "groups": groups, "expires": expires}


def report(repository: Repository, group: str, custom: Mapping[str, Any], payload_bytes: int) -> dict[str, Any]:
    roles = [group, "snapshot", "timestamp"]
    names = ["timestamp.json" if r == "timestamp" else f"{repository.version(r)}.{r}.json" for r in roles]
    metadata = sum((repository.metadata / n).stat().st_size for n in names)
    return {
        "group": group, "seq": custom["seq"], "sha256": custom["sha256"], "rollback_of": custom.get("rollback_of"),
        "payload_bytes": payload_bytes, "metadata_bytes": metadata, "target": repository.target_path(group),
    }  # fmt: skip


def _record(
    manifest: Manifest, sha256: str, seq: int, kind: str, encoding: str, base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    found = {
        "seq": seq, "sha256": sha256, "base_ids": [manifest.base_id], "kind": kind, "encoding": encoding,
        "min_version": __version__, "issued": now().isoformat(),
    }  # fmt: skip
    return found if base is None else {**found, "base": dict(base)}


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
