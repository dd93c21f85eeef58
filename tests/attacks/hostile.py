"""What somebody may do to a device or to its repository, one rule each. `CASES` maps a name to the deed.

A deed changes the repository, the device folder or the options of the device, and returns nothing; the device serves
release 1 before it. What must come of it stands beside in `test_rules`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from tuf.api.metadata import MetaFile

from lrcompress import publish
from lrcompress.edge.disk import Disk
from lrcompress.files import sha256_bytes
from lrcompress.payload import MAX_HEADER_BYTES, parse
from lrcompress.publish.keys import KeyStore
from lrcompress.publish.repository import Repository, put_metadata
from tests.support.fleet import PASSPHRASE, Fleet, made, payload_bytes, release
from tests.support.payloads import put_together, stored, taken_apart

Deed = Callable[[Fleet], None]
CASES: dict[str, Deed] = {}


def case(name: str) -> Callable[[Deed], Deed]:
    def add(deed: Deed) -> Deed:
        assert name not in CASES
        CASES[name] = deed
        return deed

    return add


# the bytes of the payload, on their way -------------------------------------------------------------------------------


def served(fleet: Fleet, change: Callable[[bytes], bytes]) -> None:
    """Publish a good release; serve other bytes in its place."""
    file = fleet.payload(fleet.add("first", encoding="f32")["sha256"])
    file.write_bytes(change(file.read_bytes()))


CASES["payload: a bit is flipped"] = lambda f: served(f, lambda b: b[:-1] + bytes([b[-1] ^ 1]))
CASES["payload: the end is missing"] = lambda f: served(f, lambda b: b[:-10])
CASES["payload: something is appended"] = lambda f: served(f, lambda b: b + b"x" * 5000)
CASES["payload: nothing is there"] = lambda f: served(f, lambda b: b"")
CASES["payload: zeros of the right length"] = lambda f: served(f, lambda b: bytes(len(b)))


@case("payload: gone")
def gone(fleet: Fleet) -> None:
    fleet.payload(fleet.add("first")["sha256"]).unlink()


@case("payload: a folder in its place")
def folder(fleet: Fleet) -> None:
    file = fleet.payload(fleet.add("first")["sha256"])
    file.unlink()
    file.mkdir()


@case("payload: a pipe in its place")
def pipe(fleet: Fleet) -> None:
    file = fleet.payload(fleet.add("first")["sha256"])
    file.unlink()
    os.mkfifo(file)


@case("payload: a link out of the repository")
def link_out(fleet: Fleet) -> None:
    file = fleet.payload(fleet.add("first")["sha256"])
    shutil.move(file, fleet.folder / "elsewhere")
    file.symlink_to(fleet.folder / "elsewhere")


@case("payload: that of another release, of the same size")
def other_payload(fleet: Fleet) -> None:
    served(fleet, lambda b: payload_bytes("second")[: len(b)].ljust(len(b), b"\0"))


# the metadata ---------------------------------------------------------------------------------------------------------


def files(fleet: Fleet) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (fleet.repo / "metadata").iterdir()}


def put(fleet: Fleet, found: dict[str, bytes]) -> None:
    for name, data in found.items():
        (fleet.repo / "metadata" / name).write_bytes(data)


def opened(fleet: Fleet) -> tuple[Repository, KeyStore]:
    repository = Repository(fleet.repo)
    return repository, KeyStore(repository.keys_folder, PASSPHRASE)


def newest(fleet: Fleet, role: str) -> Path:
    return max((fleet.repo / "metadata").glob(f"*.{role}.json"), key=lambda p: int(p.name.partition(".")[0]))


def edited(fleet: Fleet, path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_bytes())
    change(value)
    path.write_text(json.dumps(value))


@case("metadata: an older timestamp")
def older_timestamp(fleet: Fleet) -> None:
    old = files(fleet)["timestamp.json"]
    fleet.add("first")
    fleet.device(trial=unsure).update()  # the newer one is known, and nothing else has changed
    put(fleet, {"timestamp.json": old})


def unsure(data: bytes) -> None:
    from lrcompress.edge.trial import NoVerdict

    raise NoVerdict("not now")


@case("metadata: an older snapshot under a newer name")
def older_snapshot(fleet: Fleet) -> None:
    old = newest(fleet, "snapshot").read_bytes()
    fleet.add("first")
    newest(fleet, "snapshot").write_bytes(old)


@case("metadata: an older group role under a newer name")
def older_group(fleet: Fleet) -> None:
    old = newest(fleet, "default").read_bytes()
    fleet.add("first")
    newest(fleet, "default").write_bytes(old)


@case("metadata: the snapshot in the timestamp's place")
def mixed_roles(fleet: Fleet) -> None:
    fleet.add("first")
    put(fleet, {"timestamp.json": newest(fleet, "snapshot").read_bytes()})


def expired(role: str) -> Deed:
    def deed(fleet: Fleet) -> None:
        from lrcompress.publish import repository as module

        real = dict(module.EXPIRY)
        module.EXPIRY[role] = timedelta(seconds=-5)
        try:
            fleet.add("first")
            if role == "root":
                rotated(fleet)
        finally:
            module.EXPIRY.update(real)

    return deed


def rotated(fleet: Fleet, change: Callable[[Any, KeyStore], object] = lambda root, keys: None) -> None:
    """Sign a second root, changed, with the keys of the first."""
    repository, keys = opened(fleet)
    root = repository.read("root").signed
    change(root, keys)
    root.version += 1
    put_metadata(repository.metadata, "root", root, [keys.load("root")], repository.lifetime("root"))


for _role in ("timestamp", "snapshot", "group", "root"):
    CASES[f"metadata: an expired {_role} (a freeze)"] = expired(_role)


def tampered(role: str) -> Deed:
    def deed(fleet: Fleet) -> None:
        fleet.add("first")
        path = fleet.repo / "metadata" / "timestamp.json" if role == "timestamp" else newest(fleet, role)
        edited(fleet, path, lambda v: v["signed"].update(expires="2099-01-01T00:00:00Z"))

    return deed


def unsigned(role: str) -> Deed:
    def deed(fleet: Fleet) -> None:
        fleet.add("first")
        path = fleet.repo / "metadata" / "timestamp.json" if role == "timestamp" else newest(fleet, role)
        edited(fleet, path, lambda v: v.update(signatures=[]))

    return deed


for _role in ("timestamp", "snapshot", "default"):
    CASES[f"metadata: a changed {_role} under an old signature"] = tampered(_role)
    CASES[f"metadata: a {_role} that nobody signed"] = unsigned(_role)


@case("metadata: another publisher's")
def other_publisher(fleet: Fleet) -> None:
    fleet.repo.rename(fleet.folder / "true")
    publish.init_repository(fleet.repo, made() / "exported", fleet.folder / "keys2", passphrase=PASSPHRASE)
    publish.add(fleet.repo, made() / "adapters" / "first", passphrase=PASSPHRASE)


@case("metadata: another publisher's root as the second")
def other_root(fleet: Fleet) -> None:
    other_publisher(fleet)
    repository, keys = opened(fleet)
    root = repository.read("root").signed
    root.version = 2
    put_metadata(repository.metadata, "root", root, [keys.load("root")], repository.lifetime("root"))
    shutil.copy(fleet.folder / "true" / "metadata" / "1.root.json", fleet.repo / "metadata" / "1.root.json")


@case("metadata: a second root that says that it is the third")
def skipping_root(fleet: Fleet) -> None:
    rotated(fleet, lambda root, keys: setattr(root, "version", root.version + 1))
    metadata = fleet.repo / "metadata"
    (metadata / "3.root.json").rename(metadata / "2.root.json")


@case("metadata: a timestamp of a key that was revoked")
def revoked_timestamp(fleet: Fleet) -> None:
    """The root names a new timestamp key; whoever stole the old one goes on signing with it."""
    fleet.add("first")
    signed_by_old = files(fleet)["timestamp.json"]

    def change(root: Any, keys: KeyStore) -> None:
        key = keys.create("timestamp2").public_key
        root.revoke_key(root.roles["timestamp"].keyids[0], "timestamp")
        root.add_key(key, "timestamp")

    rotated(fleet, change)
    put(fleet, {"timestamp.json": signed_by_old})


@case("metadata: a group role of a key that was revoked")
def revoked_group(fleet: Fleet) -> None:
    fleet.add("first")  # signed with the key that goes
    repository, keys = opened(fleet)
    targets, snapshot = repository.read("targets").signed, repository.read("snapshot").signed
    old = targets.delegations.roles["default"].keyids[0]
    key = keys.create("default2").public_key
    targets.revoke_key(old, "default")
    targets.add_key(key, "default")
    targets.version += 1
    put_metadata(repository.metadata, "targets", targets, [keys.load("targets")], repository.lifetime("targets"))
    snapshot.meta["targets.json"] = MetaFile(version=targets.version)
    repository.seal(keys, snapshot)


@case("metadata: a group role signed with another group's key")
def stolen_group(fleet: Fleet) -> None:
    publish.add(fleet.repo, made() / "adapters" / "first", group="other", passphrase=PASSPHRASE)
    repository, keys = opened(fleet)
    forged = repository.read("default")
    forged.signed.version += 1
    forged.sign(keys.load("other"))
    forged.to_file(str(repository.metadata / f"{forged.signed.version}.default.json"))
    snapshot = repository.read("snapshot").signed
    snapshot.meta["default.json"].version = forged.signed.version
    repository.seal(keys, snapshot)


def rubbish(name: str, data: bytes) -> Deed:
    return lambda fleet: put(fleet, {name: data})


CASES["metadata: an endless timestamp"] = rubbish("timestamp.json", b" " * 20_000)
CASES["metadata: an endless root"] = rubbish("2.root.json", b" " * 600_000)
CASES["metadata: an empty timestamp"] = rubbish("timestamp.json", b"")
CASES["metadata: a timestamp that is no JSON"] = rubbish("timestamp.json", b"\xff" * 100)
CASES["metadata: a timestamp nested without end"] = rubbish("timestamp.json", b"[" * 9000)
CASES["metadata: a timestamp without anything"] = rubbish("timestamp.json", b"{}")
CASES["metadata: a root that is a list"] = rubbish("2.root.json", b"[1]")


# the release ----------------------------------------------------------------------------------------------------------


def recorded(field: str, value: Any) -> Deed:
    return lambda fleet: void(release(fleet, payload_bytes(), **{"seq": 2, field: value}))


def void(_: object) -> None: ...


for _name, _field, _value in (
    ("a seq that is text", "seq", "2"), ("a seq that is true", "seq", True), ("a negative seq", "seq", -1), ("a seq of zero", "seq", 0),
    ("no seq", "seq", None), ("a hash other than the target's", "sha256", "0" * 64),
    ("a hash that is a path", "sha256", "../../root"), ("bases that are text", "base_ids", "all"), ("no bases", "base_ids", []),
    ("a base that is a path", "base_ids", ["../x"]), ("a version that is a number", "min_version", 1), ("a rollback of the future", "rollback_of", 7),
    ("a rollback of text", "rollback_of", "1"),
):  # fmt: skip
    CASES[f"release: {_name}"] = recorded(_field, _value)

CASES["release: for a newer program"] = recorded("min_version", "99.0")
CASES["release: larger than the device allows"] = lambda f: void(release(f, b"\0" * 10, seq=2, length=65 << 20))
CASES["release: of no bytes"] = lambda f: void(release(f, b"", seq=2, length=0))


@case("release: an old one, signed anew")
def replayed(fleet: Fleet) -> None:
    """python-tuf accepts it: versions grow. Our own seq does not."""
    release(fleet, payload_bytes("first"), seq=5)
    fleet.add("second", encoding="f32")
    fleet.device().update()
    release(fleet, payload_bytes("first"), seq=5)
    fleet.serves = 6  # type: ignore[attr-defined]


@case("release: the same seq with other bytes")
def same_seq(fleet: Fleet) -> None:
    release(fleet, payload_bytes("first"), seq=1)


@case("release: an old one, after the device's metadata were lost")
def lost_metadata(fleet: Fleet) -> None:
    old = files(fleet)
    fleet.add("first")
    fleet.device().update()
    for p in (fleet.at / "metadata").rglob("*.json"):
        p.unlink()
    put(fleet, old)
    fleet.serves = 2  # type: ignore[attr-defined]


# the payload, signed by the true publisher ------------------------------------------------------------------------------

Parts = dict[str, tuple[str, list[int], bytes]]


def parts(data: bytes) -> tuple[Parts, dict[str, str]]:
    header, body = taken_apart(data)
    metadata = header.pop("__metadata__")
    return {n: (e["dtype"], e["shape"], body[slice(*e["data_offsets"])]) for n, e in header.items()}, metadata


def signed(change: Callable[[Parts, dict[str, str]], object], name: str = "first", encoding: str = "f32") -> Deed:
    """Sign a payload whose tensors or metadata were changed, with names in order."""

    def deed(fleet: Fleet) -> None:
        found, metadata = parts(payload_bytes(name, encoding=encoding))
        change(found, metadata)
        release(fleet, stored(dict(sorted(found.items())), metadata), seq=2)

    return deed


def raw(change: Callable[[bytes], bytes]) -> Deed:
    return lambda fleet: void(release(fleet, change(payload_bytes("first")), seq=2))


A, B = "conv2.lora_A", "conv2.lora_B"


def number(value: float) -> Callable[[Parts, dict[str, str]], object]:
    """Put one number into the first tensor."""
    return lambda p, m: p.update({A: (*p[A][:2], np.float32(value).tobytes() + p[A][2][4:])})


def shaped(shape: list[int], name: str = A) -> Callable[[Parts, dict[str, str]], object]:
    return lambda p, m: p.update({name: ("F32", shape, bytes(4 * int(np.prod(shape))))})


def headed(**entry: Any) -> Callable[[bytes], bytes]:
    """Change the header's entry of one tensor, leaving the bytes alone."""

    def change(data: bytes) -> bytes:
        header, body = taken_apart(data)
        header[A].update(entry)
        return put_together(header, body)

    return change


def unsorted(data: bytes) -> bytes:
    header, body = taken_apart(data)
    return put_together(dict([*list(header.items())[:1], *reversed(list(header.items())[1:])]), body)


def twice(data: bytes) -> bytes:
    header, body = taken_apart(data)
    text = json.dumps(header)
    return put_together((text[:-1] + f', "{B}": {json.dumps(header[B])}}}').encode(), body)


for _name, _deed in {
    "too short for a length": raw(lambda b: b[:5]),
    "a header longer than the file": raw(lambda b: (1 << 40).to_bytes(8, "little") + b[8:]),
    "a header that is no JSON": raw(lambda b: b[:8] + b"?" + b[9:]),
    "a header nested without end": raw(lambda b: put_together(b"[" * 9000, b"")),
    "names out of order": raw(unsorted),
    "a name twice": raw(twice),
    "a byte too few": raw(lambda b: b[:-1]),
    "bytes behind the last tensor": raw(lambda b: b + b"0000"),
    "a dtype that nobody knows": raw(headed(dtype="F64")),
    "a tensor that claims to be huge": raw(headed(shape=[1 << 39, 1 << 39])),
    "offsets of another tensor": raw(headed(data_offsets=[0, 8])),
    "an unknown field": raw(headed(extra=1)),
    "another schema": signed(lambda p, m: m.update(schema="2")),
    "an unknown kind": signed(lambda p, m: m.update(kind="oft")),
    "a kind that is not its tensors'": signed(lambda p, m: m.update(kind="core")),
    "an encoding other than the tensors'": signed(lambda p, m: m.update(encoding="f16")),
    "more metadata than is known": signed(lambda p, m: m.update(run="rm -rf /")),
    "another base": signed(lambda p, m: m.update(base_ids=json.dumps([sha256_bytes(b"x")]))),
    "other slots": signed(lambda p, m: m.update(slots_id=sha256_bytes(b"x"))),
    "a missing tensor": signed(lambda p, m: p.pop(B)),
    "one tensor too many": signed(lambda p, m: p.update({"conv9.lora_A": p[A]})),
    "a renamed tensor": signed(lambda p, m: p.update({"conv2.lora_a": p.pop(A)})),
    "a name that is a path": signed(lambda p, m: p.update({"../../etc/passwd": p.pop(A)})),
    "NaN": signed(number(float("nan"))),
    "infinity": signed(number(float("inf"))),
    "minus infinity": signed(number(float("-inf"))),
    "a pair of different ranks": signed(shaped([3, 16, 3, 3])),
    "a rank beyond the slot's": signed(lambda p, m: (shaped([400, 16, 3, 3])(p, m), shaped([32, 400, 1, 1], B)(p, m))),
    "another shape": signed(shaped([2, 9, 3, 3])),
    "fewer axes": signed(shaped([2, 72])),
    "a scale without codes": signed(lambda p, m: p.pop(f"{A}.q"), encoding="int8"),
    "codes without a scale": signed(lambda p, m: p.pop(f"{A}.scale"), encoding="int8"),
    "no golden outputs": signed(lambda p, m: p.pop("golden/output")),
    "golden outputs of another name": signed(lambda p, m: p.update({"golden/other": p.pop("golden/output")})),
    "golden outputs that are NaN": signed(lambda p, m: p.update({"golden/output": (*p["golden/output"][:2], b"\xff" * len(p["golden/output"][2]))})),
    "golden outputs of fewer samples": signed(lambda p, m: p.update({"golden/output": ("F32", [1, 5], bytes(20))})),
}.items():  # fmt: skip
    CASES[f"signed: {_name}"] = _deed


@case("signed: an oversized header")
def oversized(fleet: Fleet) -> None:
    (fleet.at / "device.json").write_text(json.dumps({"schema": 1, "max_payload_bytes": 1 << 23}))
    release(fleet, put_together(b"{" + b" " * MAX_HEADER_BYTES + b"}", b""), seq=2)


@case("signed: other answers than its publisher saw")
def other_answers(fleet: Fleet) -> None:
    golden = {k: v + np.float16(0.5) for k, v in parse(payload_bytes("first")).golden.items()}
    release(fleet, payload_bytes("first", golden=golden), seq=2)


@case("signed: answers of infinity")
def infinite_answers(fleet: Fleet) -> None:
    golden = dict(parse(payload_bytes("first")).golden)
    release(fleet, payload_bytes("first", golden=golden, change=lambda k, v: v * np.float32(1e30)), seq=2)


@case("signed: further from the base than the device allows")
def too_far(fleet: Fleet) -> None:
    (fleet.at / "device.json").write_text(json.dumps({"schema": 1, "max_distance": 1e-3}))
    fleet.add("first")


@case("signed: slower than the device allows")
def too_slow(fleet: Fleet) -> None:
    (fleet.at / "device.json").write_text(json.dumps({"schema": 1, "latency_factor": 1e-6}))
    fleet.add("first")


@case("signed: ill in use, says the operator's program")
def ill(fleet: Fleet) -> None:
    command = ["/bin/sh", "-c", 'test "$LRCOMPRESS_SEQ" = 1 || { echo the camera is blind >&2; exit 3; }']
    settings = {"schema": 1, "health_command": command, "probation_s": 0.1, "health_interval_s": 0.1}
    (fleet.at / "device.json").write_text(json.dumps(settings))
    fleet.add("first")


# the device itself ----------------------------------------------------------------------------------------------------


@case("device: full")
def full(fleet: Fleet) -> None:
    class Full(Disk):
        def free_bytes(self, path: Path) -> int:
            return 1000

    fleet.add("first")
    fleet.options["disk"] = Full()


@case("device: payloads may take no more room")
def no_room(fleet: Fleet) -> None:
    (fleet.at / "device.json").write_text(json.dumps({"schema": 1, "max_disk_bytes": 5000}))
    fleet.add("first", encoding="f32")


@case("device: another root in its folder")
def swapped_root(fleet: Fleet) -> None:
    other_publisher(fleet)
    (fleet.at / "root.json").unlink()
    shutil.copy(fleet.repo / "metadata" / "1.root.json", fleet.at / "root.json")


@case("device: settings that nobody knows")
def unknown_setting(fleet: Fleet) -> None:
    (fleet.at / "device.json").write_text(json.dumps({"schema": 1, "max_payload_byte": 1}))


@case("device: a token that everybody can read")
def loose_token(fleet: Fleet) -> None:
    (fleet.at / "device.json").write_text(json.dumps({"schema": 1, "bearer_token": "s3cret"}))


def clock(**ago: float) -> Deed:
    def deed(fleet: Fleet) -> None:
        fleet.add("first")
        fleet.options["clock"] = lambda: datetime.now(UTC) - timedelta(**ago)

    return deed


CASES["clock: of 1970"] = lambda f: (f.add("first"), f.options.update(clock=lambda: datetime(1970, 1, 1, tzinfo=UTC)))[
    1
]
CASES["clock: before this program was built"] = clock(days=3650)
CASES["clock: before the last trusted time"] = clock(hours=3)
CASES["clock: ten years ahead"] = clock(days=-3650)


@case("clock: a release that was signed in the future")
def future(fleet: Fleet) -> None:
    from lrcompress.publish import repository as module

    real = module.now
    module.now = lambda: real() + timedelta(days=100)
    try:
        fleet.add("first")
    finally:
        module.now = real
