"""A small exported model with two corrections, made once per test process; repositories and devices around it."""

from __future__ import annotations

import functools
import http.server
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tuf.api.metadata import TargetFile

import lrcompress
from lrcompress import publish
from lrcompress.adapt import adapter as make_adapter
from lrcompress.adapt._files import write_adapter
from lrcompress.edge import Device
from lrcompress.edge.disk import Disk
from lrcompress.edge.settings import load_settings
from lrcompress.edge.state import StateFiles
from lrcompress.edge.trial import NoVerdict, Trial, judge, judge_base
from lrcompress.errors import PayloadError
from lrcompress.export.payloads import payload_tensors
from lrcompress.files import sha256_bytes
from lrcompress.golden import load_golden, project
from lrcompress.manifest import Manifest
from lrcompress.model import InputSpec
from lrcompress.model.checkpoint import load_compressed
from lrcompress.payload import build, parse
from lrcompress.publish.keys import KeyStore
from lrcompress.publish.repository import Repository
from lrcompress.runtime import Session
from tests.support.nets import images, small

PASSPHRASE = "a passphrase of tests"
SPEC = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)
X, Y = images(96)


@functools.cache
def made() -> Path:
    """Return a folder with compressed/, adapters/{first,second,loha} and exported/; nobody may change it."""
    if "LRCOMPRESS_TEST_MADE" in os.environ:  # of another process, which waits for this one
        return Path(os.environ["LRCOMPRESS_TEST_MADE"])
    folder = Path(tempfile.mkdtemp(prefix="lrcompress-fleet-"))
    torch.save(small().state_dict(), folder / "model.pt")
    lrcompress.factorize(
        folder / "model.pt", rank=6, arch="tests.support.nets:small", inputs=SPEC, output=folder / "compressed"
    )
    found = load_compressed(folder / "compressed")
    for seed, (name, kind) in enumerate((("first", "lora"), ("second", "lora"), ("loha", "loha"))):
        generator, adapters = torch.Generator().manual_seed(seed), {}
        for layer in ("conv2", "mix", "fc1"):
            adapter = make_adapter(kind, weight_shape=tuple(found.module.get_submodule(layer).weight.shape), rank=2)
            adapter.load({k: torch.randn(t.shape, generator=generator) * 0.2 for k, t in adapter.tensors().items()})
            adapters[layer] = adapter
        (folder / "adapters" / name).mkdir(parents=True)
        write_adapter(folder / "adapters" / name, adapters, maker="lrcompress recover", base=found.digest, info={})
    lrcompress.export(folder / "compressed", adapters=[], output=folder / "exported", name="small")
    return folder


def trial_here(at: Path) -> Trial:
    """Return the trial of a device folder, in this process: what the child does, without the second that it takes."""

    def judged(data: bytes) -> None:
        base, limits = base_of(at), load_settings(at, Disk()).limits
        try:
            if base.name != "factory":
                judge_base(base, at / "factory", limits, 1)
            session = Session(base, manifest=Manifest.load(base), verify=False)
            judge(data, session, load_golden(base / "golden.npz"), limits)
        except PayloadError:
            raise
        except Exception as e:
            raise NoVerdict(str(e)) from e

    return judged


def base_of(at: Path) -> Path:
    """Return the base that the payload on trial is for, as the device's state says."""
    pending = StateFiles(at, Disk()).read().pending
    if pending is None or pending.base is None:
        return at / "factory"
    return next(p for p in (at / "bases" / pending.base, at / "dl" / f"{pending.base}.base") if p.is_dir())


class Fleet:
    """One repository and one device in `folder`."""

    def __init__(self, folder: Path, *, url: str | None = None, **device: object) -> None:
        self.folder, self.repo, self.at = folder, folder / "repo", folder / "device"
        publish.init_repository(self.repo, made() / "exported", folder / "keys", passphrase=PASSPHRASE)
        self.root = self.repo / "metadata" / "1.root.json"
        Device.init(self.at, made() / "exported", self.root, url or str(self.repo))
        self.options = {"sleep": lambda s: None, "trial": trial_here(self.at), **device}

    def device(self, **options: object) -> Device:
        """Open the device folder anew, as after a restart."""
        return Device(self.at, **{**self.options, **options})

    def add(self, name: str, **options: object) -> dict:
        options = {"encoding": "int8", **options}  # no shortcuts: what is fetched is the payload itself
        return publish.add(self.repo, made() / "adapters" / name, passphrase=PASSPHRASE, **options)

    def payload(self, sha256: str) -> Path:
        return next((self.repo / "targets").rglob(f"{sha256}.*"))


def answers(device: Device) -> np.ndarray:
    return device.infer({"x": X[:8]})["output"]


@contextmanager
def served(folder: Path, handler: type[http.server.BaseHTTPRequestHandler] | None = None) -> Iterator[str]:
    """Serve a folder over HTTP on this machine; yield its URL."""
    quiet = handler or type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *a: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def release(
    fleet: Fleet, data: bytes, *, seq: int, group: str = "default", length: int | None = None, **custom: object
) -> dict:
    """Sign `data` as a publisher that checks nothing would; `custom` replaces fields of the record (None removes one)."""
    repository = Repository(fleet.repo)
    keys = KeyStore(repository.keys_folder, PASSPHRASE)
    manifest = Manifest.load(made() / "exported")
    sha256 = sha256_bytes(data)
    record = {
        "seq": seq, "sha256": sha256, "base_ids": [manifest.base_id], "kind": "lora", "encoding": "f32",
        "min_version": "0.1.0", "issued": "2026-11-24T00:00:00+00:00", **custom,
    }  # fmt: skip
    record = {k: v for k, v in record.items() if v is not None}
    target = TargetFile(len(data) if length is None else length, {"sha256": sha256}, repository.target_path(group))
    repository.publish(keys, group, data, target, record)
    return record


def payload_bytes(name: str = "first", *, encoding: str = "f32", golden: dict | None = None, change=None) -> bytes:
    """Return the bytes of a correction, its tensors changed by `change`, its golden outputs its own unless given."""
    manifest = Manifest.load(made() / "exported")
    kind, tensors = payload_tensors(made() / "adapters" / name, manifest)
    if change is not None:
        tensors = {k: change(k, v) for k, v in tensors.items()}
    bare = build(tensors, manifest=manifest, kind=kind, encoding=encoding)
    if golden is None:
        session = Session(made() / "exported")
        session.swap(parse(bare))
        golden = project(session.run(load_golden(made() / "exported" / "golden.npz").inputs))
    return build(tensors, manifest=manifest, kind=kind, encoding=encoding, golden=golden)
