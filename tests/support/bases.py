"""Further base models, made from the exported one of `fleet` in milliseconds: some tensors are changed, the rest is as it was."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from lrcompress import packs
from lrcompress.files import sha256_bytes, write_json
from lrcompress.golden import load_golden
from lrcompress.manifest import DATA, GOLDEN, GRAPH, MANIFEST, Manifest, base_id, slots_id
from lrcompress.phases import pack_name
from lrcompress.publish import repository as repositories
from lrcompress.publish.keys import KeyStore
from lrcompress.publish.repository import Change, Repository
from lrcompress.runtime import Session
from tests.support.fleet import PASSPHRASE, Fleet, made

#: What each base changes: tensors and factors.
CHANGED: dict[str, dict[str, float]] = {
    "B": {"fc1.V": 0.5, "fc1.bias": 2.0},
    "C": {"fc1.V": 0.5, "fc1.U": -0.5},
    "D": {"conv2.V": 0.75, "fc1.U": 1.5},
}


def ranges(folder: Path) -> dict[str, tuple[int, int]]:
    """Return (offset, length) of every tensor in base.data."""
    graph = onnx.load(str(folder / GRAPH), load_external_data=False).graph
    found = {}
    for tensor in graph.initializer:
        about = {e.key: int(e.value) for e in tensor.external_data if e.key != "location"}
        if about:
            found[tensor.name] = (about["offset"], about["length"])
    return found


def rebased(dest: Path, tensors: Mapping[str, float], change: Callable[[dict[str, Any]], object] | None = None) -> Path:
    """Make an exported model whose tensors are multiples of those of `made`; `change` has the last word on its manifest."""
    shutil.copytree(made() / "exported", dest)
    data = bytearray((dest / DATA).read_bytes())
    for name, factor in tensors.items():
        offset, length = ranges(dest)[name]
        values = np.frombuffer(bytes(data[offset : offset + length]), np.float32) * np.float32(factor)
        data[offset : offset + length] = values.tobytes()
    (dest / DATA).write_bytes(bytes(data))
    golden = load_golden(dest / GOLDEN)
    answers = Session(dest, verify=False).run(golden.inputs)
    groups = {"input": golden.inputs, "compressed": answers, "original": golden.original}
    with open(dest / GOLDEN, "wb") as f:
        np.savez(f, **{f"{g}/{n}": v for g, found in groups.items() for n, v in found.items()})
    signed_off(dest, change)
    return dest


def signed_off(folder: Path, change: Callable[[dict[str, Any]], object] | None = None) -> None:
    """Have the manifest name the files as they are, and itself as it must."""
    raw = json.loads((folder / MANIFEST).read_text())
    for name in raw["files"]:
        content = (folder / name).read_bytes()
        raw["files"][name] = {"sha256": sha256_bytes(content), "bytes": len(content)}
    if change is not None:
        change(raw)
    files = raw["files"]
    raw["base_id"] = base_id(graph=files[GRAPH]["sha256"], data=files[DATA]["sha256"], slots=raw["slots"])
    raw["slots_id"] = slots_id(slots=raw["slots"], factors=raw["factors_digest"])
    write_json(folder / MANIFEST, raw)


@functools.cache
def base(name: str) -> Path:
    """Return the folder of base B, C or D; nobody may change it."""
    return rebased(Path(tempfile.mkdtemp(prefix="lrcompress-base-")) / name, CHANGED[name])


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def whole_pack(folder: Path, change: Callable[[dict[str, bytes]], object] | None = None) -> bytes:
    """Return the pack that brings a base whole; `change` has the last word on its files."""
    files, manifest = files_of(folder), Manifest.load(folder, verify=False)
    if change is not None:
        change(files)
    return packs.build(files, {}, result=manifest.base_id)


def release_base(
    fleet: Fleet,
    folder: Path,
    payload: bytes,
    made_packs: Mapping[str | None, bytes],
    *,
    seq: int,
    brought: Mapping[str, Any] | None = None,
    **custom: Any,
) -> dict[str, Any]:
    """Sign a base, its packs and a payload as a publisher that checks nothing would; `brought` and `custom` replace fields."""
    repository = Repository(fleet.repo)
    manifest, text = Manifest.load(folder, verify=False), (folder / MANIFEST).read_bytes()
    length = len(text) + sum(int(e["bytes"]) for e in manifest.files.values())
    about = {"base_id": manifest.base_id, "manifest": sha256_bytes(text), "bytes": length, **(brought or {})}
    record = {
        "seq": seq, "sha256": sha256_bytes(payload), "base_ids": [manifest.base_id], "kind": "lora", "encoding": "f32",
        "min_version": "0.1.0", "issued": "2026-11-24T00:00:00+00:00", "base": about, **custom,
    }  # fmt: skip
    change = Change()
    change.add(repositories.TARGET, payload, record)
    for start, data in made_packs.items():
        change.add(pack_name(start, about["base_id"]), data, {"from": start, "to": about["base_id"]})
    repository.apply(KeyStore(repository.keys_folder, PASSPHRASE), "default", change)
    return record
