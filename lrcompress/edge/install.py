"""The first boot: a device folder is made beside its place, every file and name of it durable, and renamed into it.

A cut at any moment leaves no device or a whole one; `init` given again clears away what the first one left.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CommandError, DeviceStateError, HostError, UpdateError
from ..files import sha256_bytes, sha256_json
from ..manifest import MANIFEST, Manifest, is_safe_name, strict_json
from .disk import Disk
from .folder import CONFIG, DOWNLOADS, FACTORY, METADATA, ROOT, ROOTS, SETTINGS, STORE, locked
from .state import COPIES, State, encode
from .transport import open_transport

MAKER = "lrcompress device"
MAX_CONFIG_BYTES = 64 << 10


def install(
    folder: Path,
    exported: Path,
    root: Path,
    url: str,
    group: str,
    disk: Disk,
    identity: Mapping[str, tuple[bytes, int]],
) -> None:
    """Make `folder` a device; whole or not at all. `identity`: its key and id, files with their modes.

    Raises `DeviceStateError` for a folder that is one already.
    """
    folder = folder.absolute()
    if (folder / CONFIG).exists():
        raise DeviceStateError(folder, "a new folder", "a device", "move it away to start over")
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise CommandError(folder, "a new or empty folder", "something is there", "choose another place")
    if not is_safe_name(group):
        raise CommandError("--group", "a name of a-z, 0-9, '.', '_', '-'", group)
    open_transport(url)
    manifest = Manifest.load(exported)
    files = {ROOT: (read_root(root), 0o444), **identity}
    for name in (MANIFEST, *manifest.files):
        files[f"{FACTORY}/{name}"] = ((exported / name).read_bytes(), 0o644)
    files |= {name: (encode(State()), 0o644) for name in COPIES}
    hashes = {name: sha256_bytes(files[name][0]) for name in (ROOT, f"{FACTORY}/{MANIFEST}")}
    config = {
        "schema": 1, "made_by": MAKER, "model": manifest.model, "base_id": manifest.base_id, "hashes": hashes,
        "url": url if "://" in url else str(Path(url).resolve()), "group": group,
    }  # fmt: skip
    files[CONFIG] = (_encoded(config), 0o644)
    _missing_parents(folder.parent, disk)
    stage = folder.parent / f".{folder.name}.new"
    if stage.is_dir():
        with locked(stage):  # another one may be at work this moment
            disk.clear(stage)
    disk.mkdir(stage)
    try:
        with locked(stage):
            _fill(stage, files, disk)
            Manifest.load(stage / FACTORY)
            disk.rename(stage, folder)
            disk.sync_folder(folder.parent)
    except HostError:
        if stage.exists():
            disk.clear(stage)
        raise


def _fill(stage: Path, files: Mapping[str, tuple[bytes, int]], disk: Disk) -> None:
    for name in (FACTORY, STORE, DOWNLOADS, METADATA, ROOTS):
        disk.mkdir(stage / name)
    for name, (data, mode) in files.items():
        disk.write(stage / name, data, mode)
        disk.sync(stage / name)
    for name in (FACTORY, METADATA):  # the others are empty
        disk.sync_folder(stage / name)
    disk.sync_folder(stage)


def _missing_parents(folder: Path, disk: Disk) -> None:
    """Make the folders that lead to a device, each name durable before what comes into it."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    for path in reversed(missing):
        disk.mkdir(path)
        disk.sync_folder(path.parent)


def _encoded(config: Mapping[str, Any]) -> bytes:
    """Return the configuration as a file that notices when it rots."""
    whole = {**config, "sha256": sha256_json(config)}
    return json.dumps(whole, indent=1, sort_keys=True).encode() + b"\n"


def read_config(folder: Path, disk: Disk) -> dict[str, Any]:
    """Return what `install` wrote. Raises `DeviceStateError` for anything else."""
    try:
        value = strict_json(disk.read(folder / CONFIG, MAX_CONFIG_BYTES))
    except (OSError, ValueError) as e:
        got = e.strerror if isinstance(e, OSError) else str(e)
        raise DeviceStateError(
            folder, f"a device folder ({CONFIG})", got, "make one with 'lrcompress device init'"
        ) from e
    good = isinstance(value, dict) and value.get("schema") == 1 and value.get("made_by") == MAKER
    if not good or value.pop("sha256", None) != sha256_json(value):
        remedy = f"restore it; addresses and groups are changed in {SETTINGS}"
        raise DeviceStateError(
            folder / CONFIG, "the configuration that 'lrcompress device init' wrote", "something else", remedy
        )
    return dict(value)


def check_hash(folder: Path, name: str, data: bytes, config: Mapping[str, Any]) -> bytes:
    """Return `data` of a file of the first boot. Raises `DeviceStateError` if it is not what was installed."""
    expected, found = config["hashes"][name], sha256_bytes(data)
    if found != expected:
        raise DeviceStateError(
            folder / name, f"sha256 {expected}, as installed", found, "restore it, or 'device init' anew"
        )
    return data


def read_root(path: Path) -> bytes:
    """Return the bytes of a root that is one. Raises `UpdateError`."""
    from tuf.api.exceptions import RepositoryError  # for an update only: serving does without
    from tuf.api.metadata import Metadata, Root

    try:
        data = path.read_bytes()
        if not isinstance(Metadata[Root].from_bytes(data).signed, Root):
            raise ValueError("another role")
    except OSError as e:
        raise UpdateError(
            path, "the publisher's root.json", e.strerror or str(e), "copy REPO/metadata/1.root.json"
        ) from e
    except (RepositoryError, ValueError) as e:
        raise UpdateError(path, "the publisher's root.json", str(e), "copy REPO/metadata/1.root.json") from e
    return data
