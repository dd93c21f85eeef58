"""A small exported model with two corrections, made once per test process; repositories and devices around it."""

from __future__ import annotations

import functools
import http.server
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import lrcompress
from lrcompress import publish
from lrcompress.data import Data
from lrcompress.edge import Device
from lrcompress.model import InputSpec
from tests.support.nets import images, small

PASSPHRASE = "a passphrase of tests"
SPEC = (InputSpec("x", "float32", ("batch", 3, 8, 8)),)
X, Y = images(96)


@functools.cache
def made() -> Path:
    """Return a folder with compressed/, adapters/{first,second,loha} and exported/; nobody may change it."""
    folder = Path(tempfile.mkdtemp(prefix="lrcompress-fleet-"))
    torch.save(small().state_dict(), folder / "model.pt")
    data = Data.of_arrays({"x": X}, Y)
    lrcompress.factorize(
        folder / "model.pt", ratio=0.4, calib=Data.of_arrays({"x": X}), arch="tests.support.nets:small", inputs=SPEC, output=folder / "compressed"
    )
    for seed, (name, kind) in enumerate((("first", "lora"), ("second", "lora"), ("loha", "loha"))):
        lrcompress.recover(folder / "compressed", data=data, adapter_kind=kind, rank=2, steps=20, seed=seed, name=name, output=folder / "adapters" / name)
    lrcompress.export(folder / "compressed", adapters=[], output=folder / "exported", name="small")
    return folder


class Fleet:
    """One repository and one device in `folder`."""

    def __init__(self, folder: Path, *, url: str | None = None, **device: object) -> None:
        self.folder, self.repo, self.at = folder, folder / "repo", folder / "device"
        publish.init_repository(self.repo, made() / "exported", folder / "keys", passphrase=PASSPHRASE)
        self.root = self.repo / "metadata" / "1.root.json"
        Device.init(self.at, made() / "exported", self.root, url or str(self.repo))
        self.options = {"sleep": lambda s: None, **device}

    def device(self) -> Device:
        """Open the device folder anew, as after a restart."""
        return Device(self.at, **self.options)

    def add(self, name: str, **options: object) -> dict:
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
