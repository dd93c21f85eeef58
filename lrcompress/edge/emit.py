"""The payload that is served, for applications in C, C++ or C#: `emit/<sha256>.onnx_adapter`, named by `emit/current.json`.

Both are only ever replaced by rename: the runtime maps an adapter into memory, and truncating a live one would kill the
process. An application reads current.json, loads what it names, and keeps adapter and run options alive together. The
adapter before the current one stays until the next change.

    {"schema": 1, "base": "factory", "base_id": …, "seq": 3, "sha256": …, "adapter": "<sha256>.onnx_adapter" | null, "adapter_sha256": … | null}
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ..errors import HostError
from ..files import canonical_json, sha256_bytes
from ..manifest import strict_json
from ..payload import Payload
from .bases import Base
from .disk import Disk
from .folder import EMITTED
from .state import Entry

CURRENT = "current.json"
SUFFIX = ".onnx_adapter"


def emit(folder: Path, base: Base, entry: Entry | None, payload: Payload | None, disk: Disk) -> None:
    """Have `folder/emit` name the payload that is served; null is the factory's model. Writes nothing if it does already.

    `base` is the folder of the model that the adapter is for, below `folder`.
    """
    manifest = base.manifest
    place = folder / EMITTED
    if place.is_dir():  # names that a process gave which was killed before it could make them last are built upon below
        disk.sync_folder(place)
    said = _read(place, disk)
    wanted = {
        "schema": 1,
        "base": base.folder.relative_to(folder).as_posix(),
        "base_id": manifest.base_id,
        "seq": 0,
        "sha256": None,
        "adapter": None,
        "adapter_sha256": None,
    }
    if entry is not None and payload is not None:
        data = adapter_bytes(payload.feeds(manifest))
        wanted |= {
            "seq": entry.seq,
            "sha256": entry.sha256,
            "adapter": f"{entry.sha256}{SUFFIX}",
            "adapter_sha256": sha256_bytes(data),
        }
        path = place / f"{entry.sha256}{SUFFIX}"
        if said == wanted and _holds(path, data, disk):
            return
        if not place.is_dir():
            disk.mkdir(place)
            disk.sync_folder(folder)
        if not _holds(path, data, disk):
            disk.replace(path, data)
            disk.sync_folder(place)
    elif said == wanted:
        return
    elif not place.is_dir():
        disk.mkdir(place)
        disk.sync_folder(folder)
    disk.replace(place / CURRENT, canonical_json(wanted) + b"\n")
    disk.sync_folder(place)
    keep = {CURRENT, wanted["adapter"], said.get("adapter")}
    for path in disk.names(place):
        if path.name not in keep:
            disk.clear(path)


def adapter_bytes(feeds: Mapping[str, np.ndarray]) -> bytes:
    """Return an `.onnx_adapter` of these tensors, read back and compared. Raises `HostError` for one that reads otherwise."""
    written = ort.AdapterFormat()
    written.set_adapter_version(1)
    written.set_model_version(1)
    written.set_parameters({k: ort.OrtValue.ortvalue_from_numpy(feeds[k]) for k in sorted(feeds)})
    fd = os.memfd_create("adapter")  # the runtime writes files only: this one is in memory
    try:
        name = f"/proc/self/fd/{fd}"
        written.export_adapter(name)
        read = ort.AdapterFormat.read_adapter(name).get_parameters()
        same = read.keys() == feeds.keys() and all(np.array_equal(read[k].numpy(), v) for k, v in feeds.items())
        if not same:
            raise HostError(
                "onnxruntime",
                "an .onnx_adapter that reads as it was written",
                "other tensors",
                "try another onnxruntime",
            )
        data = bytearray()
        while block := os.pread(fd, 1 << 20, len(data)):
            data += block
        return bytes(data)
    finally:
        os.close(fd)


def _read(place: Path, disk: Disk) -> dict[str, Any]:
    try:
        found = strict_json(disk.read(place / CURRENT, 1 << 16))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _holds(path: Path, data: bytes, disk: Disk) -> bool:
    try:
        return disk.read(path) == data
    except OSError:
        return False
