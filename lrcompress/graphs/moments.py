"""Moments of what a layer reads, in float64, and of two runs of it side by side: the original, and a changed prefix.

Rows are positions: (…, in) flattened, or the patches of a convolution ordered (channel, *kernel), padding included.
Batches merge without cancellation; products within a batch are single precision about a common shift.

Source: Chan, Golub & LeVeque 1983 (merging); the moments are those of maths.md §1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ..shrinkage import share
from .layers import Geometry

#: Numbers of patches that are held at a time.
_BLOCK = 8_000_000


@dataclass
class Moments:
    """Count, mean (n,) and centred second moments (n, n), the latter a sum over rows."""

    count: int = 0
    mean: np.ndarray | None = None
    second: np.ndarray | None = None

    def add(self, rows: np.ndarray) -> None:
        """Take rows (N, n) in."""
        if not len(rows):
            return
        rows = rows.astype(np.float32, copy=False)
        shift = rows.mean(0, dtype=np.float64) if self.mean is None else self.mean
        z = rows - shift.astype(np.float32)
        shift = shift.astype(np.float32).astype(np.float64)
        total = z.sum(0, dtype=np.float64)
        product = (z.T @ z).astype(np.float64)
        self.merge(Moments(len(rows), shift + total / len(rows), product - np.outer(total, total) / len(rows)))

    def merge(self, other: Moments) -> None:
        """Take the moments of other rows in."""
        if not other.count:
            return
        assert other.mean is not None and other.second is not None
        if not self.count:
            self.count, self.mean, self.second = other.count, other.mean, other.second
            return
        assert self.mean is not None and self.second is not None
        n = self.count + other.count
        delta = other.mean - self.mean
        self.second = self.second + other.second + np.outer(delta, delta) * (self.count * other.count / n)
        self.mean = self.mean + delta * (other.count / n)
        self.count = n

    @property
    def covariance(self) -> np.ndarray:
        assert self.second is not None
        return self.second / max(self.count, 1)

    @property
    def shrunk(self) -> np.ndarray:
        """The covariance, of fewer positions than numbers with what they cannot say (`lrcompress.shrinkage`)."""
        s = self.covariance
        kept, more = _shrinkage(s, self.count)
        return s if not more else kept * s + more * np.eye(len(s))


@dataclass(frozen=True)
class Drift:
    """What a layer read in the original, x, and what reaches it now, x̂, at the same positions: centred moments.

    `clean` S, `cross` C = E[x x̂ᵀ], `drifted` Ŝ, each (n, n), and both means.
    """

    count: int
    clean: np.ndarray
    cross: np.ndarray
    drifted: np.ndarray
    mean: np.ndarray
    drifted_mean: np.ndarray

    @classmethod
    def of(cls, joint: Moments) -> Drift:
        """Split moments of rows [x, x̂]."""
        s = joint.covariance
        n = len(s) // 2
        assert joint.mean is not None
        return cls(joint.count, s[:n, :n], s[:n, n:], s[n:, n:], joint.mean[:n], joint.mean[n:])

    def shrunk(self) -> Drift:
        """Return what few positions say: directions that they do not show arrive as they were sent."""
        kept, more = _shrinkage(self.drifted, self.count)
        if not more:
            return self
        eye = more * np.eye(len(self.drifted))
        clean, cross, drifted = (kept * m + eye for m in (self.clean, self.cross, self.drifted))
        return replace(self, clean=clean, cross=cross, drifted=drifted)


def _shrinkage(s: np.ndarray, count: int) -> tuple[float, float]:
    """Return what is kept of a covariance, and what each direction has more."""
    trace = float(s.trace())
    rho = share(trace, float((s * s).sum()), len(s), count)
    return 1 - rho, rho * trace / len(s)


def rows_of(
    value: np.ndarray, geometry: Geometry | None, feeds: Mapping[str, np.ndarray], wanted: int = 0
) -> Iterator[np.ndarray]:
    """Yield what a layer reads of one value as rows, in blocks; padded positions of token sequences are left out."""
    if not value.size:
        return
    if geometry is None:
        rows = value.reshape(-1, value.shape[-1])
        keep = _real(value, feeds)
        yield rows if keep is None else rows[keep]
        return
    axes = len(geometry.kernel)
    if value.ndim == axes + 1:  # a convolution may read one sample without a batch axis
        value = value[None]
    each = math.prod(value.shape[1:]) * math.prod(geometry.kernel) // max(1, math.prod(geometry.stride))
    step = max(1, _BLOCK // max(1, each))
    for start in range(0, len(value), step):
        yield patches(value[start : start + step], geometry)


def patches(x: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Return the patches (positions, in·kernel) of x (batch, in, *space), ordered (channel, *kernel)."""
    around = padding(x.shape[2:], geometry)
    if any(a or b for a, b in around):
        x = np.pad(x, [(0, 0), (0, 0), *around])
    axes = len(geometry.kernel)
    spans = [d * (k - 1) + 1 for k, d in zip(geometry.kernel, geometry.dilation, strict=True)]
    windows = sliding_window_view(x, spans, axis=tuple(range(2, 2 + axes)))
    at: list[slice] = [slice(None), slice(None)]
    at += [slice(None, None, s) for s in geometry.stride] + [slice(None, None, d) for d in geometry.dilation]
    windows = np.moveaxis(windows[tuple(at)], 1, 1 + axes)  # (batch, *positions, channel, *kernel)
    return np.ascontiguousarray(windows).reshape(-1, x.shape[1] * math.prod(geometry.kernel))


def padding(size: tuple[int, ...], geometry: Geometry) -> list[tuple[int, int]]:
    """Return (before, after) per spatial axis for an input of this size."""
    if not geometry.auto:
        return list(geometry.pads)
    found = []
    for n, k, s, d in zip(size, geometry.kernel, geometry.stride, geometry.dilation, strict=True):
        total = max((math.ceil(n / s) - 1) * s + d * (k - 1) + 1 - n, 0)
        less, more = total // 2, total - total // 2
        found.append((less, more) if geometry.auto == "upper" else (more, less))
    return found


def _real(value: np.ndarray, feeds: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Return which rows of a token value are no padding, or None where nothing says so."""
    mask = next((m for name, m in feeds.items() if "mask" in name.lower() and m.ndim == 2), None)
    if mask is None or bool(np.all(mask)):
        return None
    if value.shape[: mask.ndim] == mask.shape or (value.ndim == 2 and len(value) == mask.size):
        return mask.reshape(-1).astype(bool)
    return None


__all__ = ["Drift", "Moments", "padding", "patches", "rows_of"]
