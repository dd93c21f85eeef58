"""Whatever bytes come, a parser returns what is whole or raises from the family: nothing else ever comes out.

Half of the inputs are bytes that were good before something was done to them; the other half are structures in which
one value is another, signed or hashed anew, so that they get past the outermost check.
"""

from __future__ import annotations

import copy
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrcompress import packs
from lrcompress.edge.disk import Disk
from lrcompress.edge.install import read_config
from lrcompress.edge.settings import load_settings
from lrcompress.edge.state import Entry, Pending, Probation, State, decode, encode
from lrcompress.edge.trust import _offer
from lrcompress.errors import LrcompressError, ManifestError, PayloadError
from lrcompress.files import sha256_bytes, sha256_json
from lrcompress.manifest import Manifest, is_file_name
from lrcompress.manifest import base_id as identity
from lrcompress.manifest import slots_id as contract
from lrcompress.payload import parse
from tests.support.payloads import base, made, put_together, taken_apart

#: Inputs per parser: in `make test`, and in `make faults` (seven parsers: 140,000).
SHORT, LONG = 300, 20_000

ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20), st.just("../../x"), st.just("\ud800"),
    st.just([]), st.just({}), st.just("0" * 64), st.just(1 << 40), st.lists(st.integers(0, 9), max_size=9), st.just("a" * 5000),
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    if isinstance(value, dict):
        found += [p for k in value for p in places(value[k], (*path, k))]
    elif isinstance(value, list):
        found += [p for i, v in enumerate(value) for p in places(v, (*path, i))]
    return found


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """Return `value` with one to three of its parts replaced, removed, renamed or repeated."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value)))
        if not path:
            continue
        holder = value
        for step in path[:-1]:
            holder = holder[step]
        what = draw(st.sampled_from(["replace", "remove", "rename", "repeat"]))
        if what == "replace":
            holder[path[-1]] = draw(ODD)
        elif what == "remove":
            del holder[path[-1]]
        elif isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = holder[path[-1]] if what == "repeat" else holder.pop(path[-1])
        else:
            holder.append(holder[path[-1]])
    return value


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Return `data` with bytes flipped, cut out, put in, or moved."""
    found = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at, n = draw(st.integers(0, len(found))), draw(st.integers(0, 64))
        what = draw(st.sampled_from(["flip", "cut", "put", "end", "move"]))
        if what == "flip" and at < len(found):
            found[at] ^= draw(st.integers(1, 255))
        elif what == "cut":
            del found[at : at + n]
        elif what == "put":
            found[at:at] = draw(st.binary(max_size=64))
        elif what == "end":
            del found[at:]
        elif what == "move":
            found += found[at : at + n]
    return bytes(found)


def text(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return base(tmp_path_factory.mktemp("parsers") / "exported")


def run(strategy: st.SearchStrategy[Any], body: Callable[[Any], None], n: int) -> None:
    checks = [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
        HealthCheck.large_base_example,
    ]
    settings(max_examples=n, deadline=None, database=None, derandomize=n == SHORT, suppress_health_check=checks)(
        given(strategy)(body)
    )()


def one_line(e: LrcompressError) -> None:
    assert "\n" not in str(e) and len(str(e)) < 2000
    str(e).encode()


def payloads(manifest: Manifest, n: int) -> None:
    good = [made(manifest, kind, encoding) for kind in ("lora", "loha") for encoding in ("f32", "int8")]
    structures = [taken_apart(data) for data in good]
    strategy = st.one_of(
        st.binary(max_size=300),
        st.sampled_from(good).flatmap(damaged),
        st.sampled_from(structures).flatmap(lambda s: changed(s[0]).map(lambda h: put_together(text(h), s[1]))),
    )

    def body(data: bytes) -> None:
        try:
            found = parse(data)
            found.verify(manifest)
        except PayloadError as e:
            one_line(e)
            return
        feeds = found.feeds(manifest)
        assert all(np.isfinite(v).all() for v in feeds.values()) and feeds.keys() <= manifest.slot_tensors.keys()

    run(strategy, body, n)


def manifests(manifest: Manifest, n: int) -> None:
    data = manifest.to_bytes()

    def sealed(value: Any) -> bytes:
        """Give a changed manifest the identities that it would have, where it still can have any."""
        try:
            files = value["files"]
            value["base_id"] = identity(
                graph=files["model.onnx"]["sha256"], data=files["base.data"]["sha256"], slots=value["slots"]
            )
            value["slots_id"] = contract(slots=value["slots"], factors=value["factors_digest"])
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            pass
        return text(value)

    def body(data: bytes) -> None:
        try:
            found = Manifest.parse(data)
        except ManifestError as e:
            one_line(e)
            return
        assert found.tolerance > 0 and all(".." not in name and "/" not in name for name in found.files)

    run(st.one_of(st.binary(max_size=200), damaged(data), changed(manifest.raw).map(sealed)), body, n)


SHA = [sha256_bytes(bytes([i])) for i in range(5)]
FULL = State(
    3, 7, SHA[0], Entry(SHA[0], 7, SHA[2]), Entry(SHA[1], 6), Pending(SHA[2], 8, 1, "2026-01-01T00:00:00+00:00", 7, SHA[3]),
    Probation("boot", "2026-01-01T00:00:00+00:00", 1), SHA[3], trusted_time="2026-01-01T00:00:00+00:00",
).refuse(SHA[4], 5, "why").refuse(SHA[4], 6, "why", SHA[1])  # fmt: skip


def states(_: Manifest, n: int) -> None:
    good = encode(FULL)

    def sealed(body: Any) -> bytes:
        try:
            return text({"body": body, "sha256": sha256_json(body)})
        except (ValueError, TypeError):
            return text({"body": body, "sha256": "0" * 64})

    def body(data: bytes) -> None:
        found = decode(data)
        if found is not None:
            assert decode(encode(found)) == found
            assert found.seq >= 0 and found.generation >= 0 and all(len(s) == 64 for s in found.named)

    run(st.one_of(st.binary(max_size=200), damaged(good), changed(json.loads(good)["body"]).map(sealed)), body, n)


def releases(_: Manifest, n: int) -> None:
    record = {
        "seq": 2,
        "sha256": SHA[0],
        "base_ids": [SHA[1]],
        "min_version": "0.1.0",
        "rollback_of": 1,
        "issued": "2026-01-01",
        "base": {"base_id": SHA[1], "manifest": SHA[0], "bytes": 1000},
    }

    def body(custom: Any) -> None:
        try:
            offer = _offer(custom, 10, {"sha256": SHA[0]}, "m/g/payload.safetensors")
        except LrcompressError as e:
            one_line(e)
            return
        assert offer.base is None or (offer.base.base_id in offer.base_ids and len(offer.base.manifest) == 64)
        assert offer.seq > 0 and offer.sha256 == SHA[0] and offer.path == f"targets/m/g/{SHA[0]}.payload.safetensors"

    run(st.one_of(ODD, changed(record)), body, n)


def operators(_: Manifest, n: int, folder: Path) -> None:
    (folder / "factory").mkdir(exist_ok=True)
    (folder / "factory" / "device.json").write_text('{"schema": 1}')
    value = {
        "schema": 1, "proxy": "http://p:1", "max_bytes_per_s": 5, "health_command": ["/bin/true", "x"], "probation_s": 3, "poll_s": 9.5,
        "bearer_token_file": "/x", "ca_file": "/a", "cert_file": "/b", "key_file": "/c", "max_distance": None, "url": "https://x/",
    }  # fmt: skip

    def body(data: bytes) -> None:
        (folder / "device.json").write_bytes(data)
        try:
            found = load_settings(folder, Disk())
        except LrcompressError as e:
            one_line(e)
            return
        assert found.latency_factor > 0 and isinstance(found.health_command, tuple)

    run(st.one_of(st.binary(max_size=200), damaged(text(value)), changed(value).map(text)), body, n)


def configurations(_: Manifest, n: int, folder: Path) -> None:
    value = {
        "schema": 1,
        "made_by": "lrcompress device",
        "model": "m",
        "base_id": SHA[0],
        "hashes": {"root.json": SHA[1]},
        "url": "x",
        "group": "g",
    }
    value["sha256"] = sha256_json(value)

    def body(data: bytes) -> None:
        (folder / "config.json").write_bytes(data)
        try:
            assert read_config(folder, Disk()) == {k: v for k, v in value.items() if k != "sha256"}
        except LrcompressError as e:
            one_line(e)

    run(st.one_of(st.binary(max_size=200), damaged(text(value)), changed(value).map(text)), body, n)


def bases(_: Manifest, n: int) -> None:
    """The header of a pack, and whole packs: nothing is made but what the header says, and never more than was signed."""
    start, sizes = SHA[0], {"base.data": 500, "manifest.json": 50}
    header = {
        "start": start, "result": SHA[1],
        "files": [["base.data", [["base.data", 0, 300], 40, ["base.data", 340, 160]]], ["manifest.json", [30]]],
    }  # fmt: skip
    good = packs.build(
        {"base.data": b"a" * 300 + bytes(40) + b"b" * 160, "manifest.json": b"{}" * 15},
        {"base.data": [300, 340]}, start=start, result=SHA[1],
        known={(packs.key(b"a" * 300), 300): [("base.data", 0)], (packs.key(b"b" * 160), 160): [("base.data", 340)]},
    )  # fmt: skip

    def packed(value: Any) -> bytes:
        said = json.dumps(value).encode()
        return packs.MAGIC + zlib.compress(struct.pack("<I", len(said)) + said + bytes(70))

    def source(name: str, offset: int, length: int) -> Iterator[bytes]:
        assert offset >= 0 and offset + length <= sizes[name]
        yield bytes(length)

    def body(data: bytes) -> None:
        try:
            pack = packs.Pack([data[i : i + 7] for i in range(0, len(data), 7)], most_bytes=600)
            pack.check(start=start, result=SHA[1], sizes=sizes)
            made = {file.name: b"".join(content) for file, content in pack.files(source)}
        except LrcompressError as e:
            one_line(e)
            return
        assert all(is_file_name(name) for name in made) and "manifest.json" in made
        assert sum(map(len, made.values())) == pack.recipe.length <= 600
        assert {f.name: f.length for f in pack.recipe.files} == {name: len(made[name]) for name in made}

    inputs = st.one_of(st.binary(max_size=200), damaged(good), changed(header).map(packed))
    run(inputs, body, n)
    body(good)
    body(packed(header))


PARSERS = {"payload": payloads, "manifest": manifests, "state": states, "release": releases, "pack": bases}
IN_A_FOLDER = {"device.json": operators, "config.json": configurations}


@pytest.mark.parametrize("n", [SHORT, pytest.param(LONG, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])])
@pytest.mark.parametrize("name", [*PARSERS, *IN_A_FOLDER])
def test_nothing_but_the_family_comes_out(manifest: Manifest, tmp_path: Path, name: str, n: int) -> None:
    if name in PARSERS:
        PARSERS[name](manifest, n)
    else:
        IN_A_FOLDER[name](manifest, n, tmp_path)


def test_the_inputs_before_damage_are_good(manifest: Manifest) -> None:
    """Otherwise the runs above would test the first check only."""
    assert parse(made(manifest)).verify(manifest) is None
    assert Manifest.parse(manifest.to_bytes()).base_id == manifest.base_id
    assert decode(encode(FULL)) == FULL
    assert struct.unpack_from("<Q", made(manifest))[0] > 100
