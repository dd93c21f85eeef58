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

LOG, OLDER = "log.jsonl", "log.1.jsonl"
#: The log starts again at this size; the one before it is kept.
MAX_BYTES = 256 << 10


class StatusLog:
    """The log of one device folder."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        self._path, self._older, self._disk = folder / LOG, folder / OLDER, disk

    def write(self, at: datetime, state: str, **about: Any) -> None:
        """Append one line; a disk that refuses it is no reason to stop."""
        line = json.dumps(
            finite({"at": at.isoformat(timespec="milliseconds"), "state": state, **about}), sort_keys=True
        )
        with contextlib.suppress(HostError, OSError):
            size = self._disk.size(self._path)
            if size + len(line) > MAX_BYTES:
                self._disk.rename(self._path, self._older)
            elif size and not self._ends_whole():  # a power cut tore the last line: this one must not hang on it
                line = "\n" + line
            self._disk.append(self._path, line.encode() + b"\n")

    def _ends_whole(self) -> bool:
        with open(self._path, "rb") as f:
            f.seek(-1, 2)
            return f.read(1) == b"\n"

    def read(self) -> list[dict[str, Any]]:
        """Return the lines that are whole, oldest first."""
        found = []
        for path in (self._older, self._path):
            with contextlib.suppress(OSError):
                for line in self._disk.read(path, 2 * MAX_BYTES).splitlines():
                    with contextlib.suppress(ValueError):
                        found.append(json.loads(line))
        return [e for e in found if isinstance(e, dict)]
