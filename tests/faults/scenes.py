"""What a device does, recorded call by call, and what must hold on every disk that a power cut may leave of it.

A `Scene` starts from a folder and a repository, acts, and says where a device must end that is then left in peace.
`judge` boots an image: it must serve a payload that passed its trial, or the factory's model; remember at least what
was promised; be where the scene says after three boots; and have nothing lying about.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from lrcompress import publish
from lrcompress.edge import Device
from lrcompress.edge import emit as emitting
from lrcompress.edge.bases import Bases
from lrcompress.edge.disk import Disk
from lrcompress.edge.fetch import _Part
from lrcompress.edge.folder import COUNTER, EMITTED, KEY
from lrcompress.edge.identity import Identity
from lrcompress.edge.state import Entry, State, StateFiles
from lrcompress.edge.transport import Body, Broken, FolderTransport
from lrcompress.edge.trial import NoVerdict
from lrcompress.errors import DeviceStateError, PayloadError
from lrcompress.files import sha256_bytes
from lrcompress.manifest import MANIFEST, Manifest, strict_json
from lrcompress.publish.keys import KeyStore
from lrcompress.publish.memory import FILE as PUBLISHED
from lrcompress.publish.repository import Repository
from tests.faults.powercut import Image, Model, Op, Recorder, Stop, laid_out, taken
from tests.faults.pure import computed_once
from tests.support.bases import base
from tests.support.fleet import PASSPHRASE, Fleet, made, payload_bytes, release

BOOTS = 3
DEVICE = "device"


class Violation(AssertionError):
    """A promise that an image breaks."""


@dataclass(frozen=True)
class Sent:
    """A report that has left the device: its number is used."""

    counter: int


@dataclass(frozen=True)
class Emitted:
    """Applications in C++ were told to load the adapter of a payload."""

    sha256: str | None


@dataclass
class Scene:
    """`act` runs on a device folder that starts as `start`; afterwards a device converges to `ends` (a sha256, or None)."""

    name: str
    start: Image
    repo: str
    act: Callable[[Device], Any] | None
    ends: str | None
    said: tuple[str, ...] = ("up_to_date",)
    refused: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    #: Where a device may end as well, as long as nothing was promised.
    unless_promised: str | None = None


class World:
    """Repositories at several moments, and device folders that have followed them so far."""

    def __init__(self) -> None:
        shm = Path("/dev/shm")
        self.at = Path(tempfile.mkdtemp(prefix="lrcompress-cuts-", dir=shm if shm.is_dir() else None))
        self._pure = contextlib.ExitStack()
        self._pure.enter_context(computed_once())
        self.pool, self.live = self.at / "pool", self.at / "live"
        self.pool.mkdir()
        fleet = self.fleet = self._fleet()
        self.shas: dict[str, str] = {}
        #: What a trial says: nothing (it passes), PayloadError or NoVerdict.
        self.verdicts: dict[str, Exception] = {}
        self._now = datetime.now(UTC)
        self._keep("none")
        for name, seq in (("first", 1), ("second", 2), ("loha", 3)):
            self.shas[name] = fleet.add(name, encoding="f32")["sha256"]
            self._keep(f"r{seq}")
        self.use("r3")
        publish.rollback(fleet.repo, 2, passphrase=PASSPHRASE)
        self._keep("back")
        self._restore("r2")
        bad = payload_bytes("loha", encoding="f16")
        self.shas["bad"] = release(fleet, bad, seq=3)["sha256"]
        self.verdicts[self.shas["bad"]] = PayloadError("payload: golden output y", "an answer", "another")
        self._keep("bad")
        self._restore("r2")
        same = fleet.payload(self.shas["second"]).read_bytes()
        release(fleet, same, seq=5)
        self._keep("same")
        self._restore("r2")
        self.shas["delta"] = self._nudged("second")
        self._keep("delta")
        self._restore("r3")
        self.shas["fourth"] = fleet.add("first", encoding="int8")["sha256"]
        self._keep("r4")
        self._restore("r4")
        self._rotate_root()
        self._keep("rotated")
        self._publish_bases()
        self.folders: dict[str, Image] = {}
        self._grow_up()

    # repositories -------------------------------------------------------------------------------------------------

    def _fleet(self) -> Fleet:
        folder = self.at / "fleet"
        folder.mkdir()
        fleet = Fleet(folder)
        shutil.rmtree(fleet.at)
        (self.at / "current").symlink_to(fleet.repo)
        return fleet

    def _keep(self, name: str) -> None:
        shutil.copytree(self.fleet.repo, self.at / f"repo-{name}")

    def _nudged(self, name: str) -> str:
        """Publish a release that those who have the one before fetch as a delta; return its hash."""
        rng = np.random.default_rng(0)
        data = payload_bytes(name, change=lambda k, v: v + 0.01 * rng.standard_normal(v.shape).astype(np.float32))
        path = self.at / "nudged.safetensors"
        path.write_bytes(data)
        found = publish.add(self.fleet.repo, path, passphrase=PASSPHRASE, encoding="delta")
        assert found["encoding"] == "delta" and found["sha256"] not in self.shas.values()
        return str(found["sha256"])

    def _restore(self, name: str) -> None:
        shutil.rmtree(self.fleet.repo)
        shutil.copytree(self.at / f"repo-{name}", self.fleet.repo)
        # The history forks here on purpose: what the publisher remembers of the other one goes.
        (Repository(self.fleet.repo).keys_folder / PUBLISHED).unlink(missing_ok=True)

    def _publish_bases(self) -> None:
        """Publish bases B, C and D after release 2; B with a bad payload; and everything back to release 2 after B."""
        #: The hash of a base's manifest by the hash of each pack that leads to it.
        self.packs: dict[str, str] = {}
        for start, name, adapter, key in (
            ("r2", "B", "first", "B"), ("rB", "C", "first", "C"), ("rC", "D", "first", "D"), ("r2", "B", "loha", "badB"),
        ):  # fmt: skip
            self._restore(start)
            source = made() / "adapters" / adapter
            said = publish.base(self.fleet.repo, base(name), source, encoding="f32", passphrase=PASSPHRASE)
            self.shas[key] = said["sha256"]
            self._keep(key if key == "badB" else f"r{key}")
            tail, manifest = f"{said['base']['base_id'][:16]}.base", (base(name) / MANIFEST).read_bytes()
            for file in (self.fleet.repo / "targets").rglob(f"*{tail}"):
                self.packs[file.name.partition(".")[0]] = sha256_bytes(manifest)
        self.verdicts[self.shas["badB"]] = PayloadError("payload: golden output y", "an answer", "another")
        self._restore("rB")
        publish.rollback(self.fleet.repo, 2, passphrase=PASSPHRASE)
        self._keep("backB")

    def use(self, name: str) -> None:
        """Have the address that devices know lead to a repository."""
        current = self.at / "current"
        current.unlink()
        current.symlink_to(self.at / f"repo-{name}")

    def _rotate_root(self) -> None:
        """Sign a second root with the first one's keys, which are its keys too."""
        repository = Repository(self.fleet.repo)
        keys = KeyStore(repository.keys_folder, PASSPHRASE)
        root = repository.read("root").signed
        root.version += 1
        repository.write(keys, "root", root)
        publish.refresh(self.fleet.repo, passphrase=PASSPHRASE)

    # devices ------------------------------------------------------------------------------------------------------

    def trial(self, data: bytes) -> None:
        verdict = self.verdicts.get(sha256_bytes(data))
        if verdict is not None:
            raise verdict

    def open(self, at: Path, disk: Disk, **options: Any) -> Device:
        options = {"trial": self.trial, "sleep": lambda s: None, "clock": lambda: self._now, **options}
        return Device(at, disk=disk, **options)

    def init(self, at: Path, disk: Disk) -> Device:
        return Device.init(at, made() / "exported", self.fleet.root, (self.at / "current").as_uri(), disk=disk)

    def _grow_up(self) -> None:
        """Make the folders of a device that has taken no release, one, two and three."""
        self.live.mkdir()
        at = self.live / DEVICE
        self.use("none")
        self.init(at, Recorder(self.live))
        self.folders["0"] = taken(self.live)
        for seq in (1, 2, 3):
            self.use(f"r{seq}")
            assert self.open(at, Recorder(self.live)).update()["to_seq"] == seq
            self.folders[str(seq)] = taken(self.live)
        shutil.rmtree(self.live)
        laid_out(with_settings(self.folders["2"], emit="onnx-adapter"), self.live, self.pool)
        self.use("r2")
        self.open(at, Recorder(self.live)).update()
        self.folders["2, emitted"] = taken(self.live)
        shutil.rmtree(self.live)
        laid_out(self.folders["2"], self.live, self.pool)
        for seq, name in ((3, "B"), (4, "C")):
            self.use(f"r{name}")
            assert self.open(at, Recorder(self.live)).update()["to_seq"] == seq
            self.folders[name] = taken(self.live)
        shutil.rmtree(self.live)

    def close(self) -> None:
        self._pure.close()
        shutil.rmtree(self.at, ignore_errors=True)

    # recording ----------------------------------------------------------------------------------------------------

    def record(self, scene: Scene, **options: Any) -> Recorder:
        """Act a scene out; return what it did to the disk. What it promised to whom is in the recorder's marks."""
        self.use(scene.repo)
        shutil.rmtree(self.live, ignore_errors=True)
        laid_out(scene.start, self.live, self.pool)
        disk = Recorder(self.live, **options)
        with _marking(disk), contextlib.suppress(Stop):
            if scene.act is None:
                self.init(self.live / DEVICE, disk)
                disk.mark("a device")
            else:
                scene.act(self.open(self.live / DEVICE, disk, **scene.options))
        return disk

    def images(self, scene: Scene, disk: Recorder, most: int, seed: int = 0) -> Iterator[tuple[int, Image, list[Any]]]:
        """Yield (call, image, promises) for every disk that a cut before a call, or after the last, may leave; each once."""
        model, seen = Model(scene.start), set[tuple[object, ...]]()
        for i in range(len(disk.ops) + 1):
            promised = [what for at, what in disk.marks if at <= i]
            for image in model.images(most, seed + i):
                key = (len(promised), *sorted(image.items()))
                if key not in seen:
                    seen.add(key)
                    yield i, image, promised
            if i < len(disk.ops):
                model.do(disk.ops[i])
        if model.view() != taken(self.live):
            raise Violation(f"{scene.name}: something was done to the disk that did not go through its door")

    # judging ------------------------------------------------------------------------------------------------------

    def judge(self, scene: Scene, image: Image, promised: list[Any], disk: Recorder | None = None) -> None:
        """Boot an image until it is quiet. Raises `Violation`."""
        self.use(scene.repo)
        shutil.rmtree(self.live, ignore_errors=True)
        laid_out(image, self.live, self.pool)
        at, disk = self.live / DEVICE, disk or Recorder(self.live)
        options = {k: v for k, v in scene.options.items() if k != "sleep"}
        try:
            device = self.open(at, disk, **options)
        except DeviceStateError as e:
            if "a device" in promised or scene.act is not None:
                raise Violation(f"no device any more: {e}") from e
            self.init(at, disk)
            device = self.open(at, disk, **options)
        ends = {scene.ends} if promised or scene.unless_promised is None else {scene.ends, scene.unless_promised}
        self._serves(device)
        self._emits(at)
        self._remembers(device, at, promised)
        with _marking(disk):
            for _ in range(BOOTS):
                device = self.open(at, disk, **options)
                said = device.update()
                self._serves(device)
                if device.status()["serving"]["sha256"] in ends and said["state"] in scene.said:
                    break
        device = self.open(at, disk, **options)
        status = device.status()
        self._need(status["serving"]["sha256"] in ends and said["state"] in scene.said, f"after {BOOTS} boots: {said}")
        self._need(tuple(r["sha256"] for r in status["refused"]) == scene.refused, f"refused: {status['refused']}")
        self._tidy(at, status)

    def _need(self, good: object, what: object) -> None:
        if not good:
            raise Violation(str(what))

    def _serves(self, device: Device) -> None:
        sha = device.status()["serving"]["sha256"]
        stored = list((device.folder / "store").iterdir())
        self._need(len(stored) <= 2, f"{len(stored)} payloads are stored")
        beside = list((device.folder / "bases").glob("*"))
        self._need(len(beside) <= 2, f"{len(beside)} bases are stored")
        if sha is None:
            return
        good = set(self.shas.values()) - {self.shas["bad"], self.shas["badB"]}
        self._need(sha in good, f"{sha} never passed a trial")
        payload = device._payload
        self._need(
            payload is not None and sha256_bytes(payload.raw) == sha, "bytes that were never verified are served"
        )
        assert payload is not None
        self._need(device.manifest.base_id in payload.base_ids, "a payload is served on another base than its own")
        Manifest.load(device._base.folder)  # every file as its manifest says, and its id

    def _emits(self, at: Path) -> dict[str, Any] | None:
        """See that applications in C++ find a whole adapter of a payload that passed its trial, or none; return what they are told."""
        if not (at / EMITTED / "current.json").exists():
            return None
        try:
            said: dict[str, Any] = strict_json((at / EMITTED / "current.json").read_bytes())
            whole = (
                said["adapter"] is None
                or sha256_bytes((at / EMITTED / said["adapter"]).read_bytes()) == said["adapter_sha256"]
            )
        except (OSError, ValueError, KeyError) as e:
            raise Violation(f"current.json leads nowhere: {e}") from e
        self._need(whole, "current.json names an adapter that is not whole")
        self._need(
            said["sha256"] in {None, *self.shas.values()} - {self.shas["bad"]}, "an adapter that passed no trial"
        )
        return said

    def _remembers(self, device: Device, at: Path, promised: list[Any]) -> None:
        state = StateFiles(at, Disk()).read()
        for what in promised:
            if what == "a device":
                self._need(state.readable, "a device that was made does not know its state")
                self._need(_knows_itself(at), "a device that was made cannot sign as itself")
            elif isinstance(what, State):
                self._need(
                    state.generation >= what.generation, f"generation {state.generation} after {what.generation}"
                )
                self._need(state.seq >= what.seq, f"seq {state.seq} after {what.seq}")
                if state.generation == what.generation and what.probation is None and what.active is not None:
                    self._need(
                        device.status()["serving"]["sha256"] == what.active.sha256, "an acknowledged payload is gone"
                    )
            elif isinstance(what, dict):
                for name, version in what.items():
                    self._need(_version(at / name) >= version, f"{name}: version {version} is forgotten")
            elif isinstance(what, Sent):
                counter = Identity(at)._next()
                self._need(counter > what.counter, f"report {counter} after {what.counter}")
            elif isinstance(what, Emitted):
                said = self._emits(at)
                self._need(said is not None and said["sha256"] == what.sha256, f"emitted {what.sha256}, now {said}")
            elif isinstance(what, tuple):
                name, size = what
                there = [p.stat().st_size for p in (at / "dl" / f"{name}.part", at / "store" / name) if p.exists()]
                # A rename from one folder to another may lose both names, and is begun after the trial only.
                done = state.refusal(name) is not None or (state.pending is not None and state.pending.sha256 == name)
                made = name if size == 0 else self.packs.get(name)  # a base that was unpacked, or is to come of a pack
                if made is not None:
                    done = any(r.base == made for r in state.refused) or made in state.bases
                    done = done or Bases(at, Disk(), device.manifest).find(made, staged=True) is not None
                self._need(done or (there and max(there) >= size), f"{size} bytes that were durable are gone")

    def _tidy(self, at: Path, status: dict[str, Any]) -> None:
        """See that the folder holds what a device consists of and nothing else."""
        there = {p.relative_to(at).as_posix() for p in at.rglob("*") if not p.is_dir()}
        named = {s["sha256"] for s in (status["serving"], status["previous"], status["pending"]) if s and s["sha256"]}
        staged = {n for n in there if n.startswith(("store/", "dl/"))}
        self._need({Path(n).name.removesuffix(".part") for n in staged} == named, f"left over: {sorted(staged)}")
        known = ("factory/", "metadata/", "store/", "bases/", "dl/", "log.", f"{EMITTED}/")
        rest = {n for n in there if not n.startswith(known)} - {COUNTER}
        self._need(
            (said := self._emits(at)) is None or said["sha256"] == status["serving"]["sha256"], f"emitted: {said}"
        )
        self._need(len([n for n in there if n.startswith(f"{EMITTED}/")]) <= 3, "more than two adapters are left")
        bases = {n.split("/")[1] for n in there if n.startswith("bases/")} | {p.name for p in (at / "bases").glob("*")}
        self._need(bases == StateFiles(at, Disk()).read().bases, f"left over: bases {sorted(bases)}")
        always = {"config.json", "root.json", "state.0", "state.1", "device.key", "identity.json"}
        self._need(rest - {"device.json"} == always, f"left over: {sorted(rest)}")
        self._need(not [n for n in there if n.endswith(".tmp")], "unfinished files are left")
        beside = {p.name for p in at.parent.iterdir()}
        self._need(beside == {DEVICE}, f"left over beside the device: {sorted(beside)}")


def _knows_itself(at: Path) -> bool:
    """Tell whether a device has an identity and the key that belongs to it."""
    try:
        key = load_pem_private_key((at / KEY).read_bytes(), None)
        assert isinstance(key, Ed25519PrivateKey)
        return key.public_key().public_bytes_raw().hex() == Identity(at).public
    except (OSError, ValueError, DeviceStateError):
        return False


def _version(path: Path) -> int:
    """Return the version of a metadata file; 0 for none that can be read."""
    try:
        return int(strict_json(path.read_bytes())["signed"]["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _versions(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): _version(p) for p in sorted((folder / "metadata").rglob("*.json"))}


@contextlib.contextmanager
def _marking(disk: Recorder) -> Iterator[None]:
    """While this lasts, note in `disk` what its users are promised: states, metadata, parts of downloads, bases, what is emitted."""
    write, keep, unpack, emit = StateFiles.write, _Part.keep, Bases.unpack, emitting.emit

    def written(self: StateFiles, state: State) -> State:
        out = write(self, state)
        disk.mark(out)
        disk.mark(_versions(self._folder))
        return out

    def kept(self: _Part) -> None:
        keep(self)
        if self.size:
            disk.mark((self.path.name.removesuffix(".part"), self.size))

    def unpacked(self: Bases, pack: Path, brought: Any, *about: Any) -> None:
        unpack(self, pack, brought, *about)
        disk.mark((brought.manifest, 0))

    def emitted(folder: Path, base: Any, entry: Entry | None, *rest: Any) -> None:
        emit(folder, base, entry, *rest)
        # What was told before is not told any more.
        disk.marks = [(at, what) for at, what in disk.marks if not isinstance(what, Emitted)]
        disk.mark(Emitted(None if entry is None else entry.sha256))

    StateFiles.write, _Part.keep, Bases.unpack, emitting.emit = written, kept, unpacked, emitted  # type: ignore[method-assign]
    try:
        yield
    finally:
        StateFiles.write, _Part.keep, Bases.unpack, emitting.emit = write, keep, unpack, emit  # type: ignore[method-assign]


# the scenes -----------------------------------------------------------------------------------------------------------


def update(device: Device) -> None:
    device.update()


def with_settings(image: Image, **settings: Any) -> Image:
    return {**image, f"{DEVICE}/device.json": json.dumps({"schema": 1, **settings}).encode()}


def scenes(world: World) -> list[Scene]:
    """Return everything that a device may be doing when the power goes."""
    s, f = world.shas, world.folders
    bad, part = s["bad"], f"{DEVICE}/dl/{s['loha']}.part"
    payload = next((world.at / "repo-r3" / "targets").rglob(f"{s['loha']}.*")).read_bytes()
    stored = f"{DEVICE}/store/{s['second']}"
    rotted = {**f["2"], stored: bytes(len(f["2"][stored] or b""))}
    data = next(p for p in f["B"] if p.startswith(f"{DEVICE}/bases/") and p.endswith("/base.data"))
    rotted_base = {**f["B"], data: bytes(len(f["B"][data] or b""))}
    ill_on_b = {"health_command": ["/bin/sh", "-c", f'test "$LRCOMPRESS_SHA256" != {s["B"]}'], "probation_s": 20}
    healthy = {"health_command": ["/bin/true"], "probation_s": 20}
    ill = {"health_command": ["/bin/sh", "-c", f'test "$LRCOMPRESS_SHA256" != {s["loha"]}'], "probation_s": 20}
    return [
        Scene("first boot", {}, "none", None, None),
        Scene("first update", f["0"], "r1", update, s["first"]),
        Scene("second update", f["1"], "r2", update, s["second"]),
        Scene("third update, the oldest goes", f["2"], "r3", update, s["loha"]),
        Scene("a payload that fails its trial", f["2"], "bad", update, s["second"], ("rejected",), (bad,)),
        Scene("rolled back here", f["2"], "r2", lambda d: d.rollback(), s["first"], unless_promised=s["second"]),
        Scene("rolled back by the publisher", f["3"], "back", update, s["second"]),
        Scene("the same bytes, signed again", f["2"], "same", update, s["second"]),
        Scene("a download that goes on", {**f["2"], part: payload[:700]}, "r3", update, s["loha"]),
        Scene("a download that was poisoned", {**f["2"], part: bytes(700)}, "r3", update, s["loha"]),
        Scene("a link that is cut", f["2"], "r3", with_cuts, s["loha"]),
        Scene("a payload that rotted", rotted, "r2", update, s["second"]),
        Scene("a state copy that rotted", {**f["2"], f"{DEVICE}/state.0": b"rot"}, "r3", update, s["loha"]),
        Scene("a root that was rotated, and a release", f["3"], "rotated", update, s["fourth"]),
        Scene("a log that is full", {**f["2"], f"{DEVICE}/log.jsonl": b'{"state": "old"}\n' * 15_420}, "r3", update, s["loha"]),
        Scene("no verdict, then one", f["2"], "r3", no_verdict_first, s["loha"]),
        Scene("a newer release while one waits", f["2"], "r4", overtaken(world), s["fourth"]),
        Scene("a delta", f["2"], "delta", update, s["delta"]),
        Scene("a delta that is broken", f["2"], "delta", broken_delta, s["delta"]),
        Scene("what C++ loads, for the first time", with_settings(f["2"], emit="onnx-adapter"), "r3", update, s["loha"]),
        Scene("what C++ loads, again", f["2, emitted"], "r3", update, s["loha"]),
        Scene("two reports", {**f["2"], f"{DEVICE}/{COUNTER}": b"41"}, "r3", reports, s["loha"]),
        Scene("on probation, and well", with_settings(f["2"], **healthy), "r3", update, s["loha"]),
        Scene("on probation, and ill", with_settings(f["2"], **ill), "r3", update, s["second"], ("rejected",), (s["loha"],)),
        Scene("a new base", f["2"], "rB", update, s["B"]),
        Scene("a third base, the oldest goes", f["C"], "rD", update, s["D"]),
        Scene("a new base whose payload fails its trial", f["2"], "badB", update, s["second"], ("rejected",), (s["badB"],)),
        Scene("rolled back here from a new base", f["B"], "rB", lambda d: d.rollback(), s["second"], unless_promised=s["B"]),
        Scene("rolled back from a new base by the publisher", f["B"], "backB", update, s["second"]),
        Scene("a link that is cut while a base comes", f["2"], "rB", with_cuts, s["B"]),
        Scene("a base that rotted", rotted_base, "rB", update, s["B"]),
        Scene("no verdict on a new base, then one", f["2"], "rB", no_verdict_first, s["B"]),
        Scene("a new base on probation, and ill", with_settings(f["2"], **ill_on_b), "rB", update, s["second"], ("rejected",), (s["B"],)),
    ]  # fmt: skip


def broken_delta(device: Device) -> None:
    """Update from a server whose delta is of the right length and holds something else."""
    real = FolderTransport.get

    def get(self: FolderTransport, path: str, start: int = 0) -> Body:
        body = real(self, path, start)
        return Body(body.start, body.total, (bytes(len(b)) for b in body.blocks)) if path.endswith(".delta") else body

    FolderTransport.get = get  # type: ignore[method-assign]
    try:
        device.update()
    finally:
        FolderTransport.get = real  # type: ignore[method-assign]


def reports(device: Device) -> None:
    """Tell the publisher what an update came to, and once more."""
    identity, disk = Identity(device.folder, device._disk), device._disk
    assert isinstance(disk, Recorder)
    for said in (device.update(), None):
        disk.mark(Sent(identity.record(device.status(), said)["record"]["counter"]))


def with_cuts(device: Device) -> None:
    """Update over a link that breaks after every 600 bytes until this process gives up; then over a better one."""
    from lrcompress.edge import fetch

    real, tries = FolderTransport.get, fetch.MAX_IDLE_TRIES
    left = [2]

    def get(self: FolderTransport, path: str, start: int = 0) -> Body:
        body = real(self, path, start)
        if not path.startswith("targets/"):
            return body

        def torn() -> Iterator[bytes]:
            if left[0] > 0:
                left[0] -= 1
                yield next(iter(body.blocks))[:600]
            raise Broken("cut")

        return Body(body.start, body.total, torn())

    FolderTransport.get, fetch.MAX_IDLE_TRIES = get, 0  # type: ignore[method-assign]
    try:
        device.update()
    finally:
        FolderTransport.get, fetch.MAX_IDLE_TRIES = real, tries  # type: ignore[method-assign]
    device.update()


def no_verdict_first(device: Device) -> None:
    real = device._trial

    def none(data: bytes) -> None:
        raise NoVerdict("out of memory")

    device._trial = none
    device.update()
    device._trial = real
    device.update()


def overtaken(world: World) -> Callable[[Device], None]:
    def act(device: Device) -> None:
        world.use("r3")
        real = device._trial

        def none(data: bytes) -> None:
            raise NoVerdict("out of memory")

        device._trial = none
        device.update()
        device._trial = real
        world.use("r4")
        device.update()

    return act


def killed_at(world: World, scene: Scene, call: int, **options: Any) -> Recorder:
    """Act a scene, kill the process before a call, and let a second process act it again: what the first left is not durable."""

    def before(i: int, op: Op) -> None:
        if i == call:
            raise Stop

    disk = world.record(scene, before=before, **options)
    disk._before = None
    with _marking(disk):
        world.open(world.live / DEVICE, disk, **scene.options).update()
        # Whoever asks now is told what the second process believes, though only the first one wrote it.
        folder = world.live / DEVICE
        disk.mark(StateFiles(folder, Disk()).read())
        disk.mark(_versions(folder))
    return disk
