"""The latency table of a machine: what `device profile` writes and everything that prices reads.

table = read_table(Path("table.json"))      # ProfileError for a file that is cut off, altered, or something else
table.differs_from_here()                   # why its times may not be those of this machine, or None
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime as ort

from .._version import __version__
from ..errors import CommandError, ProfileError
from ..files import disk_errors, sha256_json, write_json
from .operators import Dims

SCHEMA, MAKER = 1, "lrcompress device profile"
_REMEDY = "make one with 'lrcompress device profile' on the device"
_MAX_BYTES = 32 << 20


@dataclass(frozen=True)
class Row:
    """One operator at one size: its median time, and by what share two halves of the rounds differed."""

    kind: str
    bits: int
    threads: int
    dims: Dims
    ms: float
    spread: float


@dataclass(frozen=True)
class LatencyTable:
    """`machine`: what it is, as far as the system tells. `run_ms`: by threads, what a request takes beside operators.

    `among`: by threads, (operators, bytes of weights, ms) of small networks: the ms that they take longer than their
    operators by themselves.

    `blocked`: whether the runtime keeps convolutions of this machine in blocks of channels. `rank_multiple`: of what
    ranks should be multiples, by bits. `retest_spread`: by threads, the median of the rows' spreads.
    """

    machine: Mapping[str, Any]
    ort: str
    rows: tuple[Row, ...]
    run_ms: Mapping[int, float]
    retest_spread: Mapping[int, float]
    among: Mapping[int, Sequence[tuple[float, float, float]]]
    blocked: bool = False
    quick: bool = False
    rank_multiple: Mapping[int, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def threads(self) -> list[int]:
        return sorted(self.run_ms)

    def check_threads(self, threads: int) -> None:
        """Raise `ProfileError` unless this many threads were measured."""
        if threads not in self.run_ms:
            have = " and ".join(map(str, self.threads))
            raise ProfileError(
                "latency table", f"times for {threads} thread{'s' * (threads > 1)}", f"for {have}",
                f"profile the device with --threads {threads}",
            )  # fmt: skip

    def differs_from_here(self) -> str | None:
        """Return why this machine's times may be others, or None."""
        here = machine()
        for key in ("arch", "cpu"):
            if here[key] != self.machine.get(key):
                return f"the latency table was measured on {self.machine.get(key)}, this machine is {here[key]}"
        if ort.__version__ != self.ort:
            return f"the latency table was measured with ONNX Runtime {self.ort}, this is {ort.__version__}"
        return None

    def as_json(self) -> dict[str, Any]:
        """Return the table as plain values, in the form of the file."""
        body = {
            "schema": SCHEMA, "made_by": MAKER, "lrcompress": __version__, "ort": self.ort, "machine": dict(self.machine),
            "quick": self.quick, "blocked": self.blocked, "seconds": round(self.seconds, 1),
            "run_ms": {str(k): v for k, v in self.run_ms.items()},
            "retest_spread": {str(k): v for k, v in self.retest_spread.items()},
            "among": {str(k): [[n, size, _rounded(ms)] for n, size, ms in own] for k, own in self.among.items()},
            "rank_multiple": {str(k): v for k, v in self.rank_multiple.items()},
            "columns": ["kind", "bits", "threads", "dims", "ms", "spread"],
            "rows": [[r.kind, r.bits, r.threads, list(r.dims), _rounded(r.ms), _rounded(r.spread)] for r in self.rows],
        }  # fmt: skip
        return {**body, "digest": sha256_json(body)}


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def machine() -> dict[str, Any]:
    """Return what this machine says of itself."""
    return {
        "arch": platform.machine().lower(), "cpu": _cpu(), "cores": os.cpu_count() or 1, "system": platform.system(),
        "release": platform.release(),
    }  # fmt: skip


def _cpu() -> str:
    """Return the processor's name: x86 says it, ARM boards give a model line or the parts of their cores."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    for key in ("model name", "Model"):
        found = re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
        if found:
            return found[1].strip()
    parts = sorted(set(re.findall(r"^CPU part\s*:\s*(\S+)$", text, re.MULTILINE)))
    return f"cpu part {' '.join(parts)}" if parts else platform.machine()


def write_table(path: Path, table: LatencyTable) -> None:
    """Write a table; a file that is there must be one. Raises `CommandError`, `HostError`."""
    check_table_output(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, table.as_json())


def check_table_output(path: Path) -> None:
    """Raise `CommandError` where a table may not be written: minutes of measuring must not end in a refusal."""
    if not path.exists():
        return
    try:
        ours = json.loads(path.read_text()).get("made_by") == MAKER
    except (OSError, ValueError, AttributeError, RecursionError):
        ours = False
    if not ours:
        raise CommandError(path, "a new file, or a latency table to replace", "something else", "name another with -o")


def read_table(path: Path) -> LatencyTable:
    """Read and check a table. Raises `ProfileError` for what is missing, cut off, altered, or no table."""
    value = _object(path)
    if value.get("made_by") != MAKER:
        raise ProfileError(path, "a latency table", f"made_by {value.get('made_by')!r}", _REMEDY)
    if value.get("schema") != SCHEMA:
        raise ProfileError(path, f"schema {SCHEMA}", value.get("schema"), _REMEDY)
    body = {k: v for k, v in value.items() if k != "digest"}
    if value.get("digest") != sha256_json(body):
        raise ProfileError(path, "a table as it was measured", "one that was altered or cut off", _REMEDY)
    try:
        return _table(body)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ProfileError(path, "the rows of a latency table", f"{type(e).__name__}: {e}", _REMEDY) from e


def _object(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as f:
            data = f.read(_MAX_BYTES + 1)
    except OSError as e:
        raise ProfileError(path, "a readable latency table", e.strerror or str(e), _REMEDY) from e
    if len(data) > _MAX_BYTES:
        raise ProfileError(path, f"at most {_MAX_BYTES} bytes", "more")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise ProfileError(path, "a whole JSON file", f"{e}", _REMEDY) from e
    if not isinstance(value, dict):
        raise ProfileError(path, "a latency table", type(value).__name__, _REMEDY)
    return value


def _table(body: Mapping[str, Any]) -> LatencyTable:
    rows = tuple(
        Row(str(k), int(b), int(t), tuple(int(v) for v in d), float(ms), float(s)) for k, b, t, d, ms, s in body["rows"]
    )
    run = _by_number(body["run_ms"])
    if not rows or any(not (math.isfinite(r.ms) and r.ms > 0 and min(r.dims) > 0) for r in rows):
        raise ValueError("times and sizes above 0")
    lacking = set(run) - {r.threads for r in rows if r.kind == "Add"}
    if lacking or not run:
        raise ValueError(f"no times for {sorted(lacking)} threads")
    return LatencyTable(
        dict(body["machine"]), str(body["ort"]), rows, run, _by_number(body["retest_spread"]),
        {int(k): [(float(n), float(b), float(ms)) for n, b, ms in own] for k, own in body["among"].items()}, bool(body["blocked"]),
        bool(body["quick"]), {k: int(v) for k, v in _by_number(body["rank_multiple"]).items()}, float(body["seconds"]),
    )  # fmt: skip


def _by_number(value: Mapping[str, Any]) -> dict[int, float]:
    return {int(k): float(v) for k, v in value.items()}
