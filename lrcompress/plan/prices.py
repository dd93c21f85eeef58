"""What operators take on one machine: a latency table becomes a function of kind, bits and size.

    prices = Prices(table, threads=2)
    prices.ms("matmul", 8, (64, 384, 1536))                     # one operator
    prices.each("matmul", 8, np.array([[64, 384, 32], …]))      # many

Each kind with its bits is a roofline: time is a non-negative sum of a call, the bytes that move and the products,
fitted to relative errors. What the measurements say beyond it, kernels that like some sizes, is interpolated between
them in the logarithms of the sizes, and fades out where nothing was measured.

Source: Williams et al. 2009 (roofline); the residual is simple kriging with an exponential kernel (Matheron 1963).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.optimize import nnls

from ..latency import Dims, LatencyTable, Row

Array = np.ndarray
#: Over how many doublings of a size one measurement tells of another, and what share of a measurement is noise.
_REACH, _NOISE = 2.0, 0.03


def _matmul(d: Array) -> list[Array]:
    m, k, n = d.T
    return [m, m * k, m * n, k * n, m * k * n]


def _bmm(d: Array) -> list[Array]:
    b, m, k, n = d.T
    return [b, b * m * k, b * k * n, b * m * n, b * m * k * n]


def _conv(d: Array) -> list[Array]:
    c_in, c_out, high, wide, height, width, stride = d.T
    positions, kernel = height * width, high * wide
    return [
        positions * c_in * stride**2, positions * c_out, positions * c_in * kernel, c_in * c_out * kernel,
        positions * c_in * c_out * kernel,
    ]  # fmt: skip


def _depthwise(d: Array) -> list[Array]:
    _, channels, high, wide, height, width, stride = d.T
    out = channels * height * width
    return [channels, out * stride**2, out, out * high * wide]


def _rows(d: Array) -> list[Array]:
    """Any operator that touches its numbers: (elements,) or (rows, columns)."""
    return [d.prod(axis=1)] if d.shape[1] == 1 else [d[:, 0], d.prod(axis=1)]


_FEATURES: Mapping[str, Callable[[Array], list[Array]]] = {
    "matmul": _matmul, "bmm": _bmm, "conv": _conv, "conv_odd": _conv, "depthwise": _depthwise,
}  # fmt: skip


def _features(kind: str, dims: Array) -> Array:
    return np.stack([np.ones(len(dims)), *_FEATURES.get(kind, _rows)(dims)], axis=1)


@dataclass(frozen=True)
class Curve:
    """The times of one kind at one precision, as a function of its sizes."""

    kind: str
    dims: Array
    ms: Array

    @cached_property
    def _coefficients(self) -> Array:
        features = _features(self.kind, self.dims)
        found, _ = nnls(features / self.ms[:, None], np.ones(len(self.ms)))
        return np.asarray(found)

    @cached_property
    def _weights(self) -> Array:
        kernel = _nearness(self.dims, self.dims) + _NOISE**2 * np.eye(len(self.dims))
        return np.asarray(np.linalg.solve(kernel, np.log(self.ms / self._roofline(self.dims))))

    def _roofline(self, dims: Array) -> Array:
        return np.asarray(np.maximum(_features(self.kind, dims) @ self._coefficients, 1e-7))

    def each(self, dims: Array) -> Array:
        """Return the ms of each row of sizes."""
        residual = _nearness(dims, self.dims) @ self._weights
        low, high = float(self._residuals.min()), float(self._residuals.max())
        return np.asarray(self._roofline(dims) * np.exp(np.clip(residual, low, high)))

    @cached_property
    def _residuals(self) -> Array:
        return np.asarray(np.log(self.ms / self._roofline(self.dims)))


def _nearness(a: Array, b: Array) -> Array:
    """Return exp(−distance) between sizes, in doublings."""
    distance = np.abs(np.log2(a)[:, None, :] - np.log2(b)[None, :, :]).sum(axis=-1)
    return np.asarray(np.exp(-distance / _REACH))


@dataclass
class Prices:
    """The prices of one machine at one number of threads. Raises `ProfileError` for threads that were not measured.

    `guessed`: kinds that were asked for and not measured; they are priced as the nearest one that was.
    """

    table: LatencyTable
    threads: int
    guessed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.table.check_threads(self.threads)
        rows: dict[tuple[str, int], list[Row]] = {}
        for row in self.table.rows:
            if row.threads == self.threads:
                rows.setdefault((row.kind, row.bits), []).append(row)
        self._curves = {key: _curve(key[0], own) for key, own in rows.items()}
        self._known: dict[tuple[str, int, Dims], float] = {}

    @property
    def run_ms(self) -> float:
        """What one request takes beside its operators."""
        return self.table.run_ms[self.threads]

    def among_ms(self, weight_bytes: float, count: int) -> float:
        """Return what `count` operators take longer in one network, reading so many bytes, than each by itself.

        The smallest of the networks that were measured says what an operator pays for being among others; larger ones
        what a byte of weights costs more when they no longer stay in the caches.
        """
        known = sorted(self.table.among.get(self.threads, ()), key=lambda n: n[1])
        if not known or not count:
            return 0.0
        each = known[0][2] / known[0][0]
        per_byte = [max(ms - each * operators, 0.0) / size for operators, size, ms in known]
        at = np.log2([size for _, size, _ in known])
        return count * each + weight_bytes * float(np.interp(np.log2(max(weight_bytes, 1.0)), at, per_byte))

    def ms(self, kind: str, bits: int, dims: Dims) -> float:
        """Return the time of one operator."""
        key = kind, bits, dims
        if key not in self._known:
            self._known[key] = float(self.each(kind, bits, np.array([dims], dtype=np.float64))[0])
        return self._known[key]

    def each(self, kind: str, bits: int, dims: Array) -> Array:
        """Return the times of operators of one kind, a row of sizes each."""
        kind, bits, dims = self._nearest(kind, bits, np.maximum(np.asarray(dims, dtype=np.float64), 1.0))
        return self._curves[kind, bits].each(dims)

    def _nearest(self, kind: str, bits: int, dims: Array) -> tuple[str, int, Array]:
        """Return the curve that serves: itself; the same kind in 32 bits; another that moves as many numbers."""
        if (kind, bits) in self._curves:
            return kind, bits, dims
        if kind == "conv_odd" and ("conv", bits) in self._curves:
            return "conv", bits, dims
        if (kind, 32) in self._curves:
            return kind, 32, dims
        self.guessed.add(kind)
        return "Add", 32, dims.prod(axis=1, keepdims=True)


def _curve(kind: str, rows: Sequence[Row]) -> Curve:
    return Curve(kind, np.array([r.dims for r in rows], dtype=np.float64), np.array([r.ms for r in rows]))
