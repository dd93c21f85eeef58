"""What may come as a new base model, one rule each; see `hostile`, whose `CASES` these join."""

from __future__ import annotations

import functools
import json
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lrcompress import packs
from lrcompress.files import canonical_json, sha256_bytes
from lrcompress.golden import load_golden, project
from lrcompress.manifest import DATA, GOLDEN, GRAPH, MANIFEST, Manifest
from lrcompress.payload import build, parse
from lrcompress.runtime import Session
from tests.support.bases import CHANGED, base, files_of, rebased, release_base, signed_off, whole_pack
from tests.support.fleet import Fleet, made, payload_bytes

Deed = Callable[[Fleet], None]
CASES: dict[str, Deed] = {}
FACTORY = Manifest.load(made() / "exported").base_id


@functools.cache
def variant(name: str) -> Path:
    """Return an exported model that is one with itself, and wrong."""
    at = Path(tempfile.mkdtemp(prefix="lrcompress-base-")) / "new"
    raw: dict[str, Callable[[dict[str, Any]], object]] = {
        "model": lambda r: r.update(model="other"),
        "inputs": lambda r: r["inputs"][0].update(shape=["batch", 3, 16, 16]),
        "outputs": lambda r: r["outputs"][0].update(name="logits"),
    }
    rebased(at, CHANGED["B"], raw.get(name))
    if name == "graph":
        (at / GRAPH).write_bytes(b"no graph at all")
    elif name == "golden":
        found = load_golden(at / GOLDEN)
        wrong = {f"compressed/{k}": v + np.float32(0.5) for k, v in found.compressed.items()}
        with open(at / GOLDEN, "wb") as f:
            np.savez(f, **{f"input/{k}": v for k, v in found.inputs.items()}, **wrong)
    elif name == "golden inputs":
        with open(at / GOLDEN, "wb") as f:
            np.savez(
                f, **{"input/x": np.zeros((2, 3, 4, 4), np.float32), "compressed/output": np.zeros((2, 5), np.float32)}
            )
    elif name == "no golden":
        (at / GOLDEN).write_bytes(b"PK")
    if name in ("graph", "golden", "golden inputs", "no golden"):
        signed_off(at)
    return at


@functools.cache
def payload_for(folder: Path) -> bytes:
    """Return a correction of a base, as its publisher would make it, whether or not the base runs."""
    manifest, found = Manifest.load(folder, verify=False), parse(payload_bytes("first"))
    bare = build(found.tensors, manifest=manifest, kind="lora", encoding="f32")
    golden: Mapping[str, np.ndarray] = found.golden
    if folder in (base("B"), base("C")):
        session = Session(folder)
        session.swap(parse(bare))
        golden = project(session.run(load_golden(folder / GOLDEN).inputs))
    if folder == base("C"):  # a payload that its base does not answer as it says
        golden = {k: v + v.dtype.type(0.5) for k, v in golden.items()}
    return build(found.tensors, manifest=manifest, kind="lora", encoding="f32", golden=golden)


def brought(
    change: Callable[[dict[str, bytes]], object] | None = None, folder: Path | None = None, **about: Any
) -> Deed:
    """Sign a base whose pack has other files than its manifest says, or whose record says otherwise."""

    def deed(fleet: Fleet) -> None:
        new = folder or base("B")
        release_base(fleet, new, payload_for(new), {None: whole_pack(new, change)}, seq=2, brought=about)

    return deed


def packed(make: Callable[[], bytes], start: str | None = None) -> Deed:
    """Sign a base whose pack is anything."""
    return lambda fleet: void(release_base(fleet, base("B"), payload_for(base("B")), {start: make()}, seq=2))


def void(_: object) -> None: ...


def headed(files: list[Any], new: bytes = b"", start: str | None = None, **other: Any) -> bytes:
    """Return a pack with this header."""
    header = {"start": start, "result": Manifest.load(base("B")).base_id, "files": files, **other}
    text = canonical_json(header)
    return packs.MAGIC + zlib.compress(struct.pack("<I", len(text)) + text + new)


def served(fleet: Fleet, change: Callable[[bytes], bytes] | None) -> None:
    """Publish a good base; serve other bytes in the place of its pack, or none."""
    brought()(fleet)
    (file,) = (fleet.repo / "targets").rglob("*.base")
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))


CASES["base: a bit of the pack is flipped"] = lambda f: served(f, lambda b: b[:-1] + bytes([b[-1] ^ 1]))
CASES["base: the end of the pack is missing"] = lambda f: served(f, lambda b: b[:-10])
CASES["base: zeros of the right length"] = lambda f: served(f, lambda b: bytes(len(b)))
CASES["base: the pack is gone"] = lambda f: served(f, None)
CASES["base: a record without a manifest"] = brought(manifest=None)
CASES["base: a record whose manifest is a path"] = brought(manifest="../../root.json")
CASES["base: a record whose length is text"] = brought(bytes="20000")
CASES["base: a record of no bytes"] = brought(bytes=0)
CASES["base: a record of another base than the release's"] = brought(base_id="ab" * 32)


def limited(**settings: Any) -> Deed:
    def deed(fleet: Fleet) -> None:
        (fleet.at / "device.json").write_text(json.dumps({"schema": 1, **settings}))
        brought()(fleet)

    return deed


CASES["base: more to fetch than the device allows"] = limited(max_update_bytes=9000)
CASES["base: more to keep than the device allows"] = limited(max_disk_bytes=30_000)


def replayed(fleet: Fleet) -> None:
    """The base of an old release, and all of it signed anew: python-tuf accepts that, seq does not."""
    brought()(fleet)
    fleet.device().update()
    folder = made() / "exported"
    release_base(fleet, folder, payload_bytes("second"), {None: whole_pack(folder)}, seq=1)
    fleet.serves = 2  # type: ignore[attr-defined]


CASES["base: an old one, signed anew"] = replayed

for _name, _deed in {
    "a changed tensor": brought(lambda f: f.update({DATA: f[DATA][:-1] + b"?"})),
    "a changed graph": brought(lambda f: f.update({GRAPH: f[GRAPH] + b"?"}), bytes=1 << 20),
    "a manifest that nobody signed": brought(lambda f: f.update({MANIFEST: f[MANIFEST] + b" "}), bytes=1 << 20),
    "a manifest that is no JSON": brought(
        lambda f: f.update({MANIFEST: b"{"}), bytes=1 << 20, manifest=sha256_bytes(b"{")
    ),
    "a file missing": brought(lambda f: f.pop(GOLDEN)),
    "a file too many": brought(lambda f: f.update({"run.sh": b"rm"}), bytes=1 << 20),
    "more bytes than were signed": brought(bytes=20_000),
    "another model": brought(folder=variant("model")),
    "other inputs": brought(folder=variant("inputs")),
    "other outputs": brought(folder=variant("outputs")),
    "a graph that no runtime loads": brought(folder=variant("graph")),
    "other answers than its publisher saw": brought(folder=variant("golden")),
    "golden inputs that it does not take": brought(folder=variant("golden inputs")),
    "no golden inputs": brought(folder=variant("no golden")),
    "a file out of its folder": packed(lambda: headed([["../x", [1]], [MANIFEST, [1]]], b"ab")),
    "a file of an absolute name": packed(lambda: headed([["/etc/x", [1]], [MANIFEST, [1]]], b"ab")),
    "a file of a hidden name": packed(lambda: headed([[".ssh", [1]], [MANIFEST, [1]]], b"ab")),
    "a file twice": packed(lambda: headed([[MANIFEST, [1]], [MANIFEST, [1]]], b"ab")),
    "no manifest": packed(lambda: headed([[DATA, [1]]], b"a")),
    "a pack that is none": packed(lambda: b"PK" * 500),
    "a pack without a stream": packed(lambda: packs.MAGIC + b"?" * 500),
    "a pack that is cut": packed(lambda: whole_pack(base("B"))[:-9]),
    "a pack with more behind it": packed(lambda: whole_pack(base("B")) + b"more"),
    "new bytes that no file takes": packed(lambda: headed([[MANIFEST, [1]]], b"ab")),
    "fewer new bytes than its files": packed(lambda: headed([[MANIFEST, [9]]], b"ab")),
    "a header longer than may be": packed(lambda: packs.MAGIC + zlib.compress(struct.pack("<I", 1 << 30))),
    "a header that is no JSON": packed(lambda: packs.MAGIC + zlib.compress(struct.pack("<I", 3) + b"[1,")),
    "a header with a word more": packed(lambda: headed([[MANIFEST, [1]]], b"a", run="x")),
    "a negative piece": packed(lambda: headed([[MANIFEST, [-1]]])),
    "a piece of true": packed(lambda: headed([[MANIFEST, [True]]])),
    "ranges in a pack from nothing": packed(lambda: headed([[MANIFEST, [[DATA, 0, 9]]]])),
    "a pack to another base": packed(lambda: headed([[MANIFEST, [1]]], b"a", result="ab" * 32)),
    "a pack from another base": packed(lambda: headed([[MANIFEST, [1]]], b"a", start="ab" * 32), FACTORY),
    "ranges beyond a file": packed(lambda: headed([[MANIFEST, [[DATA, 14_000, 9000]]]], b"", FACTORY), FACTORY),
    "ranges of a file that is not there": packed(
        lambda: headed([[MANIFEST, [["secret", 0, 9]]]], b"", FACTORY), FACTORY
    ),
    "ranges of a file outside": packed(lambda: headed([[MANIFEST, [["../root.json", 0, 9]]]], b"", FACTORY), FACTORY),
    "a bomb": packed(lambda: headed([[MANIFEST, [1 << 39]]], bytes(1 << 20))),
}.items():
    CASES[f"signed: a base, {_name}"] = _deed


def wrong_id(fleet: Fleet) -> None:
    """The record and the pack agree about an id that the files do not have."""
    new, claimed = base("B"), "ab" * 32
    pack = packs.build(files_of(new), {}, result=claimed)
    release_base(
        fleet, new, payload_for(new), {None: pack}, seq=2, brought={"base_id": claimed}, base_ids=[claimed]
    )  # fmt: skip


def slow(fleet: Fleet) -> None:
    (fleet.at / "device.json").write_text(json.dumps({"schema": 1, "latency_factor": 1e-6}))
    brought()(fleet)


def other_payload(fleet: Fleet) -> None:
    release_base(fleet, base("B"), payload_bytes("first"), {None: whole_pack(base("B"))}, seq=2)


def ill(fleet: Fleet) -> None:
    command = ["/bin/sh", "-c", 'test "$LRCOMPRESS_SEQ" = 1 || { echo the camera is blind >&2; exit 3; }']
    settings = {"schema": 1, "health_command": command, "probation_s": 0.1, "health_interval_s": 0.1}
    limited(**settings)(fleet)


#: Those that `make test` takes, too: one of each place where a base can be refused.
SHORT = {
    "base: a bit of the pack is flipped", "base: more to fetch than the device allows", "base: an old one, signed anew",
    "signed: a base, a changed tensor", "signed: a base, a manifest that nobody signed", "signed: a base, a file missing",
    "signed: a base, other inputs", "signed: a base, a file out of its folder", "signed: a base, another id than was signed",
    "signed: a base, other answers than its publisher saw", "signed: a base, slower than the device allows",
    "signed: a base, and a payload for the one before",
}  # fmt: skip
CASES["signed: a base, another id than was signed"] = wrong_id
CASES["signed: a base, slower than the device allows"] = slow
CASES["signed: a base, and a payload for the one before"] = other_payload
CASES["signed: ill in use on its new base, says the operator's program"] = ill
