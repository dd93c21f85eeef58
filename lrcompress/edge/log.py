"""The status log: one JSON line per transition, appended, never in the way of the work."""

from __future__ import annotations

import contextlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import HostError
from ..files import finite
from .disk import Disk

LOG = "log.jsonl"
#: The log starts again at this size; the one before it is kept as log.1.jsonl.
MAX_BYTES = 256 << 10


class StatusLog:
    """The log of one device folder."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        self._path, self._disk = folder / LOG, disk

    def write(self, at: datetime, state: str, **about: Any) -> None:
        """Append one line; a disk that refuses it is no reason to stop."""
        line = json.dumps(
            finite({"at": at.isoformat(timespec="milliseconds"), "state": state, **about}), sort_keys=True
        )
        with contextlib.suppress(HostError, OSError):
            if self._path.exists() and self._path.stat().st_size > MAX_BYTES:
                self._disk.rename(self._path, self._path.with_name("log.1.jsonl"))
            self._disk.append(self._path, line.encode() + b"\n")

    def read(self) -> list[dict[str, Any]]:
        """Return the lines that are whole."""
        found = []
        for line in self._path.read_bytes().splitlines() if self._path.exists() else []:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found
