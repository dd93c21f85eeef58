"""Golden inputs and outputs, the small digest of outputs that travels in a payload, and how two answers are compared.

A difference passes when |a − b| ≤ tolerance · max(1, max|expected|). Outputs too large for a payload are projected
onto a few fixed ±1 directions; the signs come from SHAKE-256 of the output's name, so that every numpy version and
CPU makes the same ones.

    golden = load_golden(folder / "golden.npz")
    report = compare(golden.compressed, session.run(golden.inputs), tolerance)
"""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ManifestError, PayloadError

#: Bytes that golden outputs may take in a small payload.
BUDGET_BYTES = 1024
#: Half a unit in the last place of float16, relative.
F16_ROUNDING = 2.0**-11


@dataclass(frozen=True)
class GoldenSet:
    """Arrays by input and output name; the first axis is the sample. `original` may be empty."""

    inputs: dict[str, np.ndarray]
    compressed: dict[str, np.ndarray]
    original: dict[str, np.ndarray]


@dataclass(frozen=True)
class OutputParity:
    """How one output compares."""

    name: str
    max_abs_diff: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.max_abs_diff <= self.tolerance  # NaN never passes

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "max_abs_diff": self.max_abs_diff, "tolerance": self.tolerance}


@dataclass(frozen=True)
class ParityReport:
    """How a set of outputs compares with what was expected."""

    outputs: tuple[OutputParity, ...] = field(default=())

    @property
    def passed(self) -> bool:
        return bool(self.outputs) and all(o.passed for o in self.outputs)

    @property
    def max_abs_diff(self) -> float:
        return max((o.max_abs_diff for o in self.outputs), default=0.0)

    @property
    def worst(self) -> OutputParity:
        """The output furthest beyond (or nearest to) its tolerance."""
        return max(self.outputs, key=lambda o: math.inf if math.isnan(o.max_abs_diff) else o.max_abs_diff / o.tolerance)

    def as_dict(self) -> dict[str, Any]:
        outputs = [o.as_dict() for o in self.outputs]
        return {"passed": self.passed, "outputs": outputs, "max_abs_diff": self.max_abs_diff}


def load_golden(path: Path) -> GoldenSet:
    """Read `golden.npz`. Raises `ManifestError`; never unpickles."""
    groups: dict[str, dict[str, np.ndarray]] = {"input": {}, "compressed": {}, "original": {}}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for key in arrays.files:
                group, _, name = key.partition("/")
                if group in groups and name:
                    groups[group][name] = arrays[key]
    except (OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as e:
        raise ManifestError(path, "golden inputs and outputs (.npz)", str(e), "export the model again") from None
    if not groups["input"] or not groups["compressed"]:
        raise ManifestError(path, "arrays input/… and compressed/…", "none", "export the model again")
    return GoldenSet(groups["input"], groups["compressed"], groups["original"])


def compare(expected: Mapping[str, np.ndarray], got: Mapping[str, np.ndarray], tolerance: float) -> ParityReport:
    """Compare every expected output; one that is missing or misshapen counts as infinitely far."""
    found = []
    for name in sorted(expected):
        want = np.asarray(expected[name], np.float64)
        # An infinity (a mask) must not make the limit infinite for its neighbours.
        limit = tolerance * max(1.0, _largest(want[np.isfinite(want)]))
        have = got.get(name)
        if have is None or have.shape != want.shape:
            found.append(OutputParity(name, math.inf, limit))
            continue
        with np.errstate(invalid="ignore"):
            difference = np.abs(want - np.asarray(have, np.float64))
        # Two equal infinities are no difference.
        difference = np.where(want == have, 0.0, difference)
        found.append(OutputParity(name, _largest(difference), limit))
    return ParityReport(tuple(found))


def project(outputs: Mapping[str, np.ndarray], budget_bytes: int = BUDGET_BYTES) -> dict[str, np.ndarray]:
    """Return per output an array (samples, k) that fits the budget: the output itself, or k fixed projections of it.

    float16, or float32 where float16 could not hold the values (which then takes twice the bytes). Raises
    `PayloadError` for outputs that are not finite.
    """
    share = budget_bytes // max(1, len(outputs))
    found = {}
    for name in sorted(outputs):
        rows = _rows(outputs[name])
        if not np.isfinite(rows).all():
            raise PayloadError(f"golden output {name}", "finite values", "NaN or infinity")
        floating = np.issubdtype(np.asarray(outputs[name]).dtype, np.floating)
        found[name] = _stored(name, rows, share, np.dtype(np.float16 if floating else np.float32))
        if not np.isfinite(found[name]).all():
            found[name] = _stored(name, rows, share, np.dtype(np.float32))
    return found


def _stored(name: str, rows: np.ndarray, share: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Return `rows` or as many projections of them as `share` bytes hold; infinite where `dtype` cannot hold them."""
    width = min(rows.shape[1], max(1, share // dtype.itemsize // max(1, rows.shape[0])))
    with np.errstate(over="ignore"):
        return _project_rows(name, rows, width).astype(dtype)


def compare_projected(
    stored: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], tolerance: float
) -> ParityReport:
    """Compare what a payload stored (see `project`) with the outputs of a run, allowing for float16's rounding."""
    projected, rounding = {}, 0.0
    for name, want in stored.items():
        if name in outputs:
            rows = _rows(outputs[name])
            if want.ndim == 2 and len(rows) == len(want) and 1 <= want.shape[1] <= rows.shape[1]:
                projected[name] = _project_rows(name, rows, want.shape[1])
        if want.dtype == np.float16:
            rounding = F16_ROUNDING
    return compare(stored, projected, tolerance + rounding)


def _largest(values: np.ndarray) -> float:
    return float(np.max(np.abs(values), initial=0.0))


def _rows(array: np.ndarray) -> np.ndarray:
    """Return `array` as float64 (samples, the rest flattened)."""
    array = np.asarray(array, np.float64)
    return array.reshape(1, 1) if array.ndim == 0 else array.reshape(len(array), math.prod(array.shape[1:]))


def _project_rows(name: str, rows: np.ndarray, width: int) -> np.ndarray:
    """Project (samples, d) onto `width` directions of ±1/√d, so that values keep the outputs' own magnitude."""
    d = rows.shape[1]
    if width >= d:
        return rows
    columns = []
    for i in range(width):
        bits = hashlib.shake_256(f"{name}\0{d}\0{i}".encode()).digest((d + 7) // 8)
        signs = np.unpackbits(np.frombuffer(bits, np.uint8), count=d).astype(np.float64) * 2 - 1
        columns.append(rows @ signs / math.sqrt(d))
    return np.stack(columns, axis=1)
