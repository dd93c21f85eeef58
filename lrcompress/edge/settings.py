"""What a device allows itself: `factory/device.json` as it was exported, and over it the operator's own `device.json`.

    {"schema": 1, "proxy": "http://proxy:3128", "ca_file": "/etc/ssl/fleet.pem", "max_bytes_per_s": 20000,
     "health_command": ["/usr/bin/check-camera"], "probation_s": 120}

Every setting has one spelling, and an unknown one in the operator's file is an error that names the nearest.
"""

from __future__ import annotations

import difflib
import stat
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import DeviceStateError
from ..manifest import load_limits, strict_json
from .disk import Disk
from .folder import FACTORY, SETTINGS
from .trial import Limits

MAX_BYTES = 64 << 10
EMITS = ("onnx-adapter",)
REMEDY = "correct device.json; 'lrcompress device --help' lists the settings"


@dataclass(frozen=True)
class Settings:
    """The settings of one device; every default is what a device does that nobody configured."""

    #: What one payload may be: bytes, times the base's latency, threads of a request, distance from the base.
    max_payload_bytes: float = 64 << 20
    latency_factor: float = 20.0
    threads: float = 1
    max_distance: float | None = None
    #: A trial that has not answered by then has no verdict.
    trial_timeout_s: float = 600.0

    #: Where updates come from, if not from where 'device init' said.
    url: str | None = None

    #: The way to the repository. Files hold PEM; the token goes to the repository's own host only.
    proxy: str | None = None
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    bearer_token: str | None = None
    bearer_token_file: str | None = None
    max_bytes_per_s: float | None = None

    #: What payloads and the bases that came with them may take together, what must stay free on the disk beside them,
    #: and what may be fetched for a base and its payload.
    max_disk_bytes: float | None = None
    max_update_bytes: float | None = None
    min_free_bytes: float | None = None

    #: Exit code 0 says that the device is well with the payload that was just activated; run until the window ends.
    health_command: tuple[str, ...] = ()
    probation_s: float = 60.0
    health_interval_s: float = 10.0
    health_timeout_s: float = 30.0

    #: What is written for applications in other languages: "onnx-adapter", or nothing.
    emit: str | None = None

    #: How the agent polls: about every so many seconds.
    poll_s: float = 3600.0

    @property
    def limits(self) -> Limits:
        return Limits(self.max_payload_bytes, self.latency_factor, self.max_distance)


def exported_settings(folder: Path) -> Settings:
    """Return what the exported model says alone. Raises `ManifestError`."""
    return replace(Settings(), **load_limits(folder / FACTORY))  # type: ignore[arg-type]


def load_settings(folder: Path, disk: Disk) -> Settings:
    """Return the settings of a device folder. Raises `DeviceStateError` for an operator's file that is wrong."""
    base, path = exported_settings(folder), folder / SETTINGS
    try:
        data = disk.read(path, MAX_BYTES)
    except FileNotFoundError:
        return base
    except OSError as e:
        raise DeviceStateError(path, "settings that can be read", e.strerror or str(e), REMEDY) from e
    try:
        value = strict_json(data)
    except ValueError as e:
        raise DeviceStateError(path, "JSON", str(e), REMEDY) from None
    if not isinstance(value, dict) or value.pop("schema", None) != 1:
        raise DeviceStateError(path, "an object with schema 1", type(value).__name__, REMEDY)
    found = replace(base, **{k: _checked(path, k, v) for k, v in value.items()})
    _check_together(path, found)
    return found


def _checked(path: Path, key: str, value: Any) -> Any:
    """Return one setting as it is kept. Raises `DeviceStateError`."""
    kinds = {f.name: str(f.type) for f in fields(Settings)}
    if key not in kinds:
        near = difflib.get_close_matches(key, kinds, 1)
        raise DeviceStateError(path, f"settings that exist{f' ({near[0]}?)' if near else ''}", key, REMEDY)
    kind = kinds[key]
    if value is None and "None" in kind:
        return None
    if kind.startswith("float"):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e15:
            raise DeviceStateError(f"{path}: {key}", "a positive number", value, REMEDY)
        return float(value)
    if kind.startswith("tuple"):
        if not isinstance(value, list) or not all(isinstance(v, str) and v and "\0" not in v for v in value):
            raise DeviceStateError(
                f"{path}: {key}", 'a list of a program and its arguments, as ["/bin/true"]', value, REMEDY
            )
        return tuple(value)
    if not isinstance(value, str) or not value or any(ord(c) < 33 or ord(c) > 126 for c in value):
        raise DeviceStateError(f"{path}: {key}", "text without blanks", "another value", REMEDY)
    if key == "emit" and value not in EMITS:
        raise DeviceStateError(f"{path}: {key}", " or ".join(EMITS), value, REMEDY)
    if key == "proxy" and urlsplit(value).scheme not in ("http", "https"):
        raise DeviceStateError(f"{path}: {key}", "http://HOST:PORT", value, REMEDY)
    return value


def _check_together(path: Path, found: Settings) -> None:
    if bool(found.cert_file) != bool(found.key_file):
        raise DeviceStateError(path, "cert_file and key_file together", "one of them", REMEDY)
    if found.bearer_token and found.bearer_token_file:
        raise DeviceStateError(path, "bearer_token or bearer_token_file", "both", REMEDY)
    if found.bearer_token and path.lstat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        raise DeviceStateError(
            path, "a file with a token that only its owner can read", "others can", f"chmod 600 {path}"
        )
    for key in ("ca_file", "cert_file", "key_file", "bearer_token_file"):
        name = getattr(found, key)
        if name is not None and not Path(name).is_absolute():
            raise DeviceStateError(f"{path}: {key}", "an absolute path", name, REMEDY)
