"""The decompositions that a graph can hold, in NumPy: SVD of a matrix, a kernel or a table; Tucker-2 of a kernel.

    svd      W ≈ U V                      a convolution: k×k to r channels, then 1×1; a table: rows of r, then a product
    tucker   W ≈ Z ×₀ O ×₁ I              1×1, k×k on few channels, 1×1

With input moments S both minimise E‖(W − Ŵ)x‖², without inverting S (svd), or exactly for the given input basis
(tucker). They are the formulas of `lrcompress.factorize`, which needs torch; nothing here does, and a test holds the
two against each other.

Source: Eckart & Young 1936; Wang et al., arXiv 2403.07378 (the one-sided optimum); Kim et al., arXiv 1511.06530.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

FORMS = ("svd", "tucker")
Rank = int | tuple[int, int]
#: Ranks per layer, and per side of a kernel, that an allocation may choose from.
_POINTS, _SIDE = 48, 10


@dataclass(frozen=True)
class Metric:
    """What an error costs: `s` (n, n), second moments of the input rows, or `rows`, the share of each row of a table."""

    s: np.ndarray | None = None
    rows: np.ndarray | None = None

    def loss(self, error: np.ndarray) -> float:
        """Return E‖error · x‖² of an error (m, n)."""
        if self.rows is not None:
            return float((self.rows[:, None] * error**2).sum())
        return float((error**2).sum() if self.s is None else ((error @ self.s) * error).sum())


@dataclass(frozen=True)
class Option:
    """One way to hold a layer, with the numbers it stores and what it loses."""

    form: str
    rank: Rank | None
    params: int
    loss: float


@dataclass(frozen=True)
class Factors:
    """Factors in double precision, by name. `shape` is that of the weight."""

    form: str
    rank: Rank
    shape: tuple[int, ...]
    arrays: dict[str, np.ndarray]

    @property
    def params(self) -> int:
        return sum(a.size for a in self.arrays.values())

    def dense(self) -> np.ndarray:
        """Return the weight that the factors stand for."""
        a = self.arrays
        if self.form == "svd":
            return np.asarray(flat(a["U"]) @ flat(a["V"])).reshape(self.shape)
        made = np.einsum("oa,ai...,ij->oj...", flat(a["O"]), a["core"], flat(a["I"]))
        return np.asarray(made).reshape(self.shape)


def flat(weight: np.ndarray) -> np.ndarray:
    return weight.reshape(len(weight), -1)


def serves(form: str, kind: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a form makes sense for a layer: Tucker-2 needs a kernel of more than one tap."""
    return form == "svd" or (form == "tucker" and kind == "conv" and math.prod(shape[2:]) > 1)


def full_rank(form: str, shape: tuple[int, ...]) -> Rank:
    """Return the rank at which a form is exact."""
    kernel = math.prod(shape[2:])
    if form == "svd":
        return min(shape[0], math.prod(shape[1:]))
    return min(shape[0], shape[1] * kernel), min(shape[1], shape[0] * kernel)


def clip(form: str, shape: tuple[int, ...], n: int) -> Rank:
    """Return the rank that `--rank n` means."""
    top = full_rank(form, shape)
    return min(n, top) if isinstance(top, int) else (min(n, top[0]), min(n, top[1]))


def n_params(form: str, shape: tuple[int, ...], rank: Rank) -> int:
    """Return the numbers that a form stores at a rank."""
    if isinstance(rank, int):
        return rank * (shape[0] + math.prod(shape[1:]))
    out, inner = rank
    return shape[1] * inner + inner * out * math.prod(shape[2:]) + out * shape[0]


def decompose(form: str, weight: np.ndarray, rank: Rank, metric: Metric) -> Factors:
    """Return the factors of `weight` (out, in, *kernel), best in `metric` for the form."""
    shape, ones = weight.shape, (1,) * (weight.ndim - 2)
    w = flat(weight).astype(np.float64)
    if isinstance(rank, int):
        u, v = _svd(w, rank, metric)
        u, v = _balanced(*_signed(u, v))
        # A convolution holds its second factor as a 1×1 kernel.
        return Factors(form, rank, shape, {"U": u.reshape(shape[0], rank, *ones), "V": v.reshape(rank, *shape[1:])})
    o, core, i = _tucker(weight.astype(np.float64), rank, metric)
    arrays = {"O": o.reshape(shape[0], rank[0], *ones), "core": core, "I": i.T.reshape(rank[1], shape[1], *ones)}
    return Factors(form, rank, shape, arrays)


def spectrum(weight: np.ndarray, metric: Metric) -> np.ndarray:
    """Return the squared singular values in the metric, descending: what each rank explains."""
    w = flat(weight).astype(np.float64)
    if metric.rows is not None:
        return np.linalg.eigvalsh(w.T @ (metric.rows[:, None] * w))[::-1].clip(0)
    if metric.s is None or len(w) <= w.shape[1]:
        ws = w if metric.s is None else w @ metric.s
        k = ws @ w.T if len(w) <= w.shape[1] else w.T @ ws
        return np.linalg.eigvalsh(k)[::-1].clip(0)
    b = w @ root(metric.s)[0]
    return np.linalg.eigvalsh(b.T @ b)[::-1].clip(0)


def options(
    form: str, kind: str, weight: np.ndarray, metric: Metric, *, multiple: int = 1, every: bool = False
) -> Iterator[Option]:
    """Yield ranks that store fewer numbers than the weight, with what they lose: a grid, or with `every` all of them."""
    shape = weight.shape
    if not serves(form, kind, shape):
        return
    if form == "svd":
        most = min(full_rank("svd", shape), (weight.size - 1) // (shape[0] + math.prod(shape[1:])))  # type: ignore[type-var]
        values = spectrum(weight, metric)
        tails = np.maximum(values.sum() - np.cumsum(values), 0)
        for r in _grid(int(most), 10**9 if every else _POINTS, multiple):
            yield Option(form, r, n_params(form, shape, r), float(tails[min(r, len(tails)) - 1]))
        return
    top = full_rank("tucker", shape)
    assert isinstance(top, tuple)
    kernel = math.prod(shape[2:])
    w = weight.astype(np.float64)
    total = metric.loss(flat(w))
    basis = _input_basis(w, top[1], metric)
    for inner in _grid(top[1], _SIDE, multiple):
        x, _ = _projected(w, basis[:, :inner], metric)
        kept = np.cumsum(np.linalg.eigvalsh(x.T @ x)[::-1].clip(0))
        for out in _grid(top[0], _SIDE, multiple):
            params = n_params(form, shape, (out, inner))
            if params < weight.size and out <= inner * kernel:
                yield Option(form, (out, inner), params, max(total - float(kept[out - 1]), 0.0))


def _grid(most: int, points: int, multiple: int) -> list[int]:
    """Return up to `points` ranks in 1…most, multiples of `multiple` where there are any."""
    if most < 1:
        return []
    ranks = np.unique(np.rint(np.linspace(1, most, min(points, most))).astype(int))
    if multiple > 1:
        ranks = np.unique(np.maximum(ranks // multiple, 1) * multiple)
        ranks = ranks[ranks <= most]
    return [int(r) for r in ranks]


def root(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the symmetric root of a positive semidefinite matrix, and its pseudo-inverse."""
    values, vectors = np.linalg.eigh(s)
    values = values.clip(0)
    half = np.sqrt(values)
    least = half.max(initial=0.0) * 1e-7
    inverse = np.divide(1.0, half, out=np.zeros_like(half), where=half > least)
    return (vectors * half) @ vectors.T, (vectors * inverse) @ vectors.T


def _top(k: np.ndarray, rank: int) -> np.ndarray:
    vectors: np.ndarray = np.linalg.eigh((k + k.T) / 2)[1][:, ::-1][:, :rank]
    return vectors


def _svd(w: np.ndarray, rank: int, metric: Metric) -> tuple[np.ndarray, np.ndarray]:
    if metric.rows is not None:
        p = _top(w.T @ (metric.rows[:, None] * w), rank)
        return w @ p, p.T
    s = metric.s
    if s is None:
        p, d, qt = np.linalg.svd(w, full_matrices=False)
        return p[:, :rank] * d[:rank], qt[:rank]
    if len(w) <= w.shape[1]:
        p = _top(w @ s @ w.T, rank)
        return p, p.T @ w
    # The smaller side: eigenvectors of L_S Wᵀ W L_S give the same left space, still without an inverse.
    b = w @ root(s)[0]
    p, _ = np.linalg.qr(b @ _top(b.T @ b, rank))
    return p, p.T @ w


def _signed(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Make the largest entry of each left vector positive, so that equal inputs give equal files."""
    sign = np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])
    sign[sign == 0] = 1
    return u * sign, v * sign[:, None]


def _balanced(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give both factors one norm: half precision and quantization like that."""
    size_u, size_v = np.linalg.norm(u), np.linalg.norm(v)
    if not (size_u > 0 and size_v > 0):
        return u, v
    share = math.sqrt(size_v / size_u)
    return u * share, v / share


def _input_basis(w: np.ndarray, inner: int, metric: Metric) -> np.ndarray:
    """Return orthonormal directions of the input channels (in, inner), best first, by the channels' covariance."""
    out, channels = w.shape[:2]
    taps = w.reshape(out, channels, -1)
    if metric.s is None:
        return _top(np.einsum("oik,ojk->ij", taps, taps), inner)
    kernel = taps.shape[2]
    own = np.einsum("ikjk->ij", metric.s.reshape(channels, kernel, channels, kernel)) / kernel
    half, inverse = root(own)
    scaled = np.einsum("oik,ij->ojk", taps, half)
    back = inverse @ _top(np.einsum("oik,ojk->ij", scaled, scaled), inner)
    # Channels that never carried anything leave zero columns: any direction serves there.
    basis, _ = np.linalg.qr(back + 1e-12 * np.eye(channels, inner))
    return np.asarray(basis)


def _projected(w: np.ndarray, u_in: np.ndarray, metric: Metric) -> tuple[np.ndarray, np.ndarray]:
    """Return X = R⁺ Qᵀ S Wᵀ and R⁺, with R R = Qᵀ S Q and Q = U_in ⊗ I: (R_in·k², out)."""
    out, channels = w.shape[:2]
    kernel, inner = math.prod(w.shape[2:]), u_in.shape[1]
    taps = w.reshape(out, channels, kernel)
    if metric.s is None:
        x = np.einsum("oik,ir->rko", taps, u_in).reshape(inner * kernel, out)
        return x, np.eye(inner * kernel)
    s = metric.s.reshape(channels, kernel, channels, kernel)
    qsq = np.einsum("ikjl,ir,js->rksl", s, u_in, u_in, optimize=True).reshape(inner * kernel, -1)
    _, inverse = root((qsq + qsq.T) / 2)
    ws = (flat(w) @ metric.s).reshape(out, channels, kernel)
    wsq = np.einsum("oik,ir->rko", ws, u_in).reshape(inner * kernel, out)
    return inverse @ wsq, inverse


def _tucker(w: np.ndarray, rank: tuple[int, int], metric: Metric) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return O (out, R_out), core (R_out, R_in, *kernel) and the input basis (in, R_in)."""
    u_in = _input_basis(w, rank[1], metric)
    x, inverse = _projected(w, u_in, metric)
    p = _top(x.T @ x, rank[0])
    core = (inverse @ x @ p).T
    return p, core.reshape(*rank, *w.shape[2:]), u_in


__all__ = [
    "FORMS",
    "Factors",
    "Metric",
    "Option",
    "Rank",
    "clip",
    "decompose",
    "full_rank",
    "n_params",
    "options",
    "serves",
]
