"""A new base model for devices in the field: what they have of it already, and packs that bring the rest (see `packs`).

base(repo, "exported2", "adapters/second", group="default", passphrase=p)     # one release: the base and its payload

    REPO/bases/<base_id>.json      where the ranges of a base's files are, by hash: tensors, golden arrays, pieces of the rest
    REPO/targets/<model>/<group>/<sha256>.<base_id>.base              the whole base, for any device
    REPO/targets/<model>/<group>/<sha256>.<from>-<base_id>.base       for a device that has another one

The index is all that is kept of a base: its folder may have been replaced by the next export when that is published.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tuf.api.metadata import TargetFile

from .. import packs
from ..errors import CommandError, ManifestError, PayloadError
from ..files import canonical_json, disk_errors, sha256_bytes, sha256_file, write_atomic, write_json
from ..manifest import DATA, GOLDEN, GRAPH, MANIFEST, Manifest
from ..phases import PACK, pack_name
from .repository import CONFIG, Change, Repository

FOLDER = "bases"
#: Pieces of files without tensors are about so long; a shift in such a file costs two of them.
_PIECE_BITS = 8
#: What the signed entry of a pack costs every device: a pack from another base must save more.
ENTRY_BYTES = 330


# the base of a group --------------------------------------------------------------------------------------------------


def load(repository: Repository, base_id: str | None = None) -> tuple[Path, Manifest]:
    """Return folder and manifest of a base (None: of the one that the repository was made for).

    Raises `PayloadError` where the folder holds another one by now.
    """
    folder = repository.exported
    for about in repository.config.get("bases", ()):
        if about["base_id"] == base_id:
            folder = (repository.folder / about["exported"]).resolve()
    manifest = Manifest.load(folder)
    if manifest.model != repository.model:
        raise PayloadError(folder, f"the model {repository.model}", manifest.model, "this repository serves one model")
    if base_id is not None and manifest.base_id != base_id:
        raise PayloadError(
            folder, f"base {base_id[:16]}, which devices have", manifest.base_id[:16],
            "send it to them with 'lrcompress publish base', or export the old one there again",
        )  # fmt: skip
    return folder, manifest


def current(repository: Repository, group: str) -> tuple[Path, Manifest]:
    """Return folder and manifest of the base that a group's newest release is for."""
    latest = repository.latest(group)
    return load(repository, None if latest is None else str(latest.custom["base_ids"][0]))


def record(manifest_bytes: bytes, manifest: Manifest) -> dict[str, Any]:
    """Return what a release says of the base that comes with it."""
    length = len(manifest_bytes) + sum(int(e["bytes"]) for e in manifest.files.values())
    return {"base_id": manifest.base_id, "manifest": sha256_bytes(manifest_bytes), "bytes": length}


def remember(repository: Repository, folder: Path, found: Index) -> None:
    """Note where a base is, and its ranges, before anything is signed that is about it."""
    path = index_file(repository.folder, found.base_id)
    with disk_errors(path):
        path.parent.mkdir(exist_ok=True)
    write_atomic(path, found.to_bytes())
    about = {"base_id": found.base_id, "exported": os.path.relpath(folder.resolve(), repository.folder.resolve())}
    others = [b for b in repository.config.get("bases", ()) if b["base_id"] != found.base_id]
    repository.config["bases"] = [*others, about]
    write_json(repository.folder / CONFIG, repository.config)


def index_file(repository: Path, base_id: str) -> Path:
    return repository / FOLDER / f"{base_id}.json"


# what a base consists of ----------------------------------------------------------------------------------------------


class Index:
    """The ranges of a base's files: (file, offset, length, key)."""

    def __init__(self, base_id: str, ranges: Sequence[tuple[str, int, int, str]]) -> None:
        self.base_id, self.ranges = base_id, ranges

    @classmethod
    def of(cls, folder: Path, manifest: Manifest) -> Index:
        """Return the index of an exported model."""
        found = []
        for name, edges in cuts(folder, manifest).items():
            data = memoryview((folder / name).read_bytes())
            for begin, end in itertools.pairwise(edges):
                found.append((name, begin, end - begin, packs.key(data[begin:end])))
        return cls(manifest.base_id, found)

    @classmethod
    def read(cls, repository: Repository, base_id: str) -> Index | None:
        """Return the index that was remembered of a base, else that of its folder; None if neither is there any more."""
        try:
            value = json.loads(index_file(repository.folder, base_id).read_bytes())
            return cls(base_id, [(str(n), int(o), int(b), str(k)) for n, o, b, k in value["ranges"]])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        try:
            return cls.of(*load(repository, base_id))
        except PayloadError:
            return None

    def to_bytes(self) -> bytes:
        return canonical_json({"schema": 1, "base_id": self.base_id, "ranges": [list(r) for r in self.ranges]})

    @property
    def known(self) -> packs.Known:
        found = defaultdict[tuple[str, int], list[tuple[str, int]]](list)
        for name, offset, length, key in self.ranges:
            found[key, length].append((name, offset))
        return found


def tensors(folder: Path) -> list[tuple[str, int]]:
    """Return (key, length) of every constant of an exported model."""
    data = memoryview((folder / DATA).read_bytes())
    return [(packs.key(data[o : o + n]), n) for o, n in _spans(folder / GRAPH)]


def cuts(folder: Path, manifest: Manifest) -> dict[str, list[int]]:
    """Return the offsets between ranges of every file, both ends included: around tensors and arrays, or where content says."""
    found = {}
    for name in (MANIFEST, *manifest.files):
        size = (folder / name).stat().st_size
        if name == DATA:
            inner = [c for o, n in _spans(folder / GRAPH) for c in (o, o + n)]
        elif name == GOLDEN:
            inner = list(_arrays(folder / name))
        else:
            inner = _pieces((folder / name).read_bytes())
        found[name] = sorted({0, size, *(c for c in inner if 0 < c < size)})
    return found


def _spans(graph: Path) -> Iterator[tuple[int, int]]:
    """Yield offset and length of the graph's constants in its data file."""
    import onnx

    def within(g: Any) -> Iterator[Any]:
        yield from g.initializer
        for node in g.node:
            for a in node.attribute:
                yield from [a.t] if a.HasField("t") else a.tensors
                for sub in [a.g] if a.HasField("g") else a.graphs:
                    yield from within(sub)

    for tensor in within(onnx.load(str(graph), load_external_data=False).graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            about = {e.key: e.value for e in tensor.external_data}
            yield int(about.get("offset", 0)), int(about.get("length", 0))


def _arrays(npz: Path) -> Iterator[int]:
    """Yield where the members of an .npz begin and end."""
    with open(npz, "rb") as f, zipfile.ZipFile(f) as members:
        for member in members.infolist():
            f.seek(member.header_offset + 26)
            name, extra = struct.unpack("<HH", f.read(4))
            begin = member.header_offset + 30 + name + extra
            yield from (begin, begin + member.compress_size)


def _pieces(data: bytes) -> list[int]:
    """Return where to cut a file of any kind: after eight bytes whose hash says so, whatever stands before them."""
    values = np.frombuffer(data, np.uint8).astype(np.uint64)
    if len(values) < 8:
        return []
    words = np.zeros(len(values) - 7, np.uint64)
    for k in range(8):
        words |= values[k : len(values) - 7 + k] << np.uint64(8 * k)
    hashes = (words * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - _PIECE_BITS)
    return [int(i) + 8 for i in np.flatnonzero(hashes == 0)]


# packs ----------------------------------------------------------------------------------------------------------------


def make(folder: Path, manifest: Manifest, before: Sequence[Index]) -> dict[str | None, bytes]:
    """Return packs that lead to a base by what they start from: nothing, and each base before from which that is shorter."""
    files = {name: (folder / name).read_bytes() for name in (MANIFEST, *manifest.files)}
    at = cuts(folder, manifest)
    found: dict[str | None, bytes] = {None: packs.build(files, at, result=manifest.base_id)}
    for index in before:
        pack = packs.build(files, at, result=manifest.base_id, start=index.base_id, known=index.known)
        if len(pack) + ENTRY_BYTES < len(found[None]):
            found[index.base_id] = pack
    return found


def starts(repository: Repository, group: str, result: str, most: int = 3) -> list[str]:
    """Return the bases that devices of a group may have: the first one, the group's, and the newest ones, the newest first."""
    latest = repository.latest(group)
    of_group = [] if latest is None else [str(latest.custom["base_ids"][0])]
    known = [str(b["base_id"]) for b in repository.config.get("bases", ())]
    ordered = list(dict.fromkeys([*of_group, *known[:1], *reversed(known)]))
    return [b for b in ordered if b != result][:most]


def add_packs(change: Change, made: Mapping[str | None, bytes], result: str) -> None:
    for start, data in made.items():
        change.add(pack_name(start, result), data, {"from": start, "to": result})


def bring_first(repository: Repository, group: str, change: Change, custom: Mapping[str, Any]) -> dict[str, Any]:
    """Have a change for the first base bring it to devices that were made with a later one; return the record with that said.

    Nothing ever brought the first base, so its packs are made here, of its folder. Where that holds another base by
    now, those devices wait for the next release.
    """
    base_id, known = str(custom["base_ids"][0]), repository.config.get("bases", ())
    if custom.get("base") or len(known) < 2:
        return dict(custom)
    try:
        folder, manifest = load(repository, base_id)
    except (PayloadError, ManifestError):
        return dict(custom)
    others = [found for b in starts(repository, group, base_id) if (found := Index.read(repository, b)) is not None]
    add_packs(change, make(folder, manifest, others), base_id)
    return {**custom, "base": record((folder / MANIFEST).read_bytes(), manifest)}


def keep_packs(repository: Repository, group: str, change: Change, *records: Mapping[str, Any]) -> None:
    """Have a change offer the packs of the bases that these releases bring, and no others.

    Those of a base that was given up meanwhile come back. Raises `PayloadError` if they are gone.
    """
    needed = {r["base"]["base_id"] for r in records if r.get("base")}
    tails, drop = tuple(pack_name(None, b) for b in needed), change.drop
    change.drop = lambda name: drop(name) or (name.endswith(PACK) and not name.endswith(tails))
    for base_id in sorted(needed):
        whole = pack_name(None, base_id)
        if whole in change.put:
            continue
        for name, target in _packs(repository, group, base_id).items():
            change.point(name, target.length, target.hashes["sha256"], target.custom or {})
        if whole not in change.put:
            raise PayloadError(
                repository.folder, f"the pack of base {base_id[:16]}", "none any more", "publish it again with 'publish base'"
            )  # fmt: skip


def _packs(repository: Repository, group: str, base_id: str) -> dict[str, TargetFile]:
    """Return the packs that led to a base when they were offered last, as far as their bytes are still there."""
    tail, newest = pack_name(None, base_id), repository.version(group) if group in repository.groups() else 0
    for version in range(newest, 0, -1):
        if not repository.file(group, version).exists():
            continue
        offered = {p.rpartition("/")[2]: t for p, t in repository.read(group, version).signed.targets.items()}
        if tail in offered:
            return {n: t for n, t in offered.items() if n.endswith(tail) and _there(repository, group, n, t)}
    return {}


def _there(repository: Repository, group: str, name: str, target: TargetFile) -> bool:
    file = repository.payload_file(group, target.hashes["sha256"], name)
    return file.is_file() and sha256_file(file) == target.hashes["sha256"]


def first(repository: Repository) -> str | None:
    """Return the base that the repository was made for, where that is on record."""
    return next((str(b["base_id"]) for b in repository.config.get("bases", ())), None)


def check_new(repository: Repository, group: str, new: Manifest, where: Path) -> None:
    """Raise unless a group could go on with the base `new`."""
    if new.model != repository.model:
        raise PayloadError(where, f"the model {repository.model}", new.model, "this repository serves one model")
    latest = repository.latest(group)
    if latest is not None and new.base_id in latest.custom["base_ids"]:
        raise CommandError(
            "lrcompress publish base --exported", "another base than devices have", f"the same ({new.base_id[:16]})",
            "publish corrections of it with 'publish add'",
        )  # fmt: skip
    ports = repository.config.get("ports")
    for side, found in new.ports.items():
        if ports is not None and [list(p) for p in found] != ports[side]:
            raise PayloadError(
                f"{where}: {side}",
                f"those that applications know: {ports[side]}",
                f"{found}",
                "make new devices for it",
            )
