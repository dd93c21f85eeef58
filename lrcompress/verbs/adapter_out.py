"""The verb `adapter convert --to payload|onnx_adapter`: an adapter as the exported model that it belongs to takes it.

An adapter folder, or a payload that was published before; the exported model decides which slots there are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .. import payload as payloads
from ..errors import CommandError
from ..export import onnx_adapter
from ..export.payloads import Bases, payload_tensors
from ..files import write_atomic
from ..golden import project
from ..manifest import Manifest
from ..runtime import Session

FORMATS = {"payload": ".safetensors", "onnx_adapter": onnx_adapter.SUFFIX}


def emit(
    adapter: str | Path, *, to: str, exported: str | Path | None, output: str | Path, base: Bases | None = None
) -> dict[str, Any]:
    """Write `adapter` for the model in `exported`, in a format that runs there; `base`: for weight-decomposed ones.

    Raises `CommandError`, `PayloadError` for an adapter of another base or of layers without a slot; nothing is written.
    """
    where, path = f"lrcompress adapter convert --to {to}", Path(output)
    if exported is None:
        raise CommandError(where, "the exported model that it is for", "none", "name its folder with --exported")
    if path.suffix != FORMATS[to] or path.exists():
        got = "one that exists" if path.exists() else path.name
        raise CommandError(output, f"the name of a new {FORMATS[to]} file", got, "choose another with -o")
    if not path.absolute().parent.is_dir():
        raise CommandError(output, "a place in a folder", "no such folder", "make it first")
    data = of_exported(Path(adapter), Path(exported), base)
    manifest = Manifest.load(Path(exported))
    found = payloads.parse(data)
    if to == "onnx_adapter":
        data = onnx_adapter.pack(found, manifest)
    write_atomic(path, data)
    rows = sorted({n.rpartition(".")[0] for n, v in found.feeds(manifest).items() if v.size})
    return {"output": str(output), "format": to, "kind": found.kind, "layers": rows, "bytes": len(data)}


def of_exported(adapter: Path, exported: Path, base: Bases | None = None) -> bytes:
    """Return the payload of an adapter folder, or of a payload file, checked against the exported model."""
    manifest = Manifest.load(exported)
    if adapter.is_file():
        data = adapter.read_bytes()
        payloads.parse(data).verify(manifest)
        return data
    kind, tensors = payload_tensors(adapter, manifest, base)
    return with_goldens(exported, manifest, kind, tensors)


def with_goldens(exported: Path, manifest: Manifest, kind: str, tensors: dict[str, np.ndarray]) -> bytes:
    """Return the bytes of a payload with the answers that the exported model gives with it."""
    bare = payloads.build(tensors, manifest=manifest, kind=kind, encoding="f32")
    session = Session(exported, threads=1, manifest=manifest, verify=False)
    session.swap(payloads.parse(bare))
    with np.load(exported / "golden.npz") as golden:
        answers = session.run({k.removeprefix("input/"): golden[k] for k in golden if k.startswith("input/")})
    return payloads.build(tensors, manifest=manifest, kind=kind, encoding="f32", golden=project(answers))
