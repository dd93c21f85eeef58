"""Entrywise product of two low-rank matrices, W ≈ (B₁A₁)∘(B₂A₂): rank up to r² from 2r(m + n) numbers.

It saves bytes, not time: the weight is rebuilt once, when the layer is loaded. Each block is a linear least-squares
problem for the others fixed, solved exactly in the metric of the statistics, in turn. The start is the best rank-r
matrix times ones, so the result is never worse than that; the other start, sign(W)∘√|W| times √|W|, is tried as well.

Source: the block solution is the normal equation; starts as in arXiv 2504.13633 (the second one).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from . import svd
from ._curves import measured
from ._linalg import convolve, unfolded
from ._refit import sweep
from ._types import ConvGeometry, Factorization, Point, Rank, Statistics

LAYERS = frozenset({"linear", "conv", "embedding"})
_NAME = __name__.rpartition(".")[2]
#: Saves bytes only, and twice the rank of an SVD's bytes: never a default.
AUTO = False
#: The rebuilt weight is what multiplies the activation.
DENSE_AT_RUN_TIME = True
_BLOCKS = ("B1", "A1", "B2", "A2")
_SWEEPS = 25

full_rank, clip = svd.full_rank, svd.clip


def n_params(shape: tuple[int, ...], rank: Rank) -> int:
    return 2 * svd.n_params(shape, rank)


def n_macs(shape: tuple[int, ...], rank: Rank, positions: int) -> int:
    rows, columns = svd.sides(shape)
    return rows * columns * positions


def decompose(weight: Tensor, rank: Rank, statistics: Statistics | None = None) -> Factorization:
    """Return `B1`, `B2` (out, r) and `A1`, `A2` (r, in, *k)."""
    metric, shape = statistics or Statistics(), tuple(weight.shape)
    start = svd.decompose(weight.double(), rank)
    assert isinstance(rank, int)
    w = weight.double()

    def build(f: Mapping[str, Tensor]) -> Tensor:
        return to_tensor(f, shape)

    found = [_plain(unfolded(w), f, rank) for f in (_from_svd(start, rank), _from_roots(unfolded(w), rank))]
    best = min(found, key=lambda f: float((w - build(f)).square().sum()))
    if metric.sides != (None, None):
        weighted = _from_svd(svd.decompose(w, rank, statistics), rank)
        found = [sweep(build, f, w, metric, names=_BLOCKS, sweeps=4, steps=2 * rank + 10) for f in (best, weighted)]
        best = min(found, key=lambda f: metric.loss(w - build(f)))
    return Factorization.of(_NAME, _rebalanced(best, rank, shape), weight, rank, statistics)


def _plain(w: Tensor, factors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Solve block after block, exactly: row i of B₁ is the least-squares fit of row i of W to the rows of A₁ scaled by G₂."""
    f = dict(factors)
    before = float((w - (f["B1"] @ f["A1"]) * (f["B2"] @ f["A2"])).square().sum())
    ridge = torch.eye(rank, dtype=w.dtype)
    for _ in range(_SWEEPS):
        for one, two in (("1", "2"), ("2", "1")):
            other = f[f"B{two}"] @ f[f"A{two}"]
            f[f"B{one}"] = f[f"B{one}"] + _rows(w, f[f"A{one}"], other, f[f"B{one}"], ridge)
            f[f"A{one}"] = (f[f"A{one}"].T + _rows(w.T, f[f"B{one}"].T, other.T, f[f"A{one}"].T, ridge)).T
        after = float((w - (f["B1"] @ f["A1"]) * (f["B2"] @ f["A2"])).square().sum())
        if not after < before * (1 - 1e-5):
            break
        before = after
    return f


def _rows(w: Tensor, a: Tensor, other: Tensor, b: Tensor, ridge: Tensor) -> Tensor:
    """Return the step of B that minimises ‖W − (B A)∘other‖, a ridge keeping it where nothing is to be gained."""
    residual = (w - (b @ a) * other) * other
    normal = torch.einsum("rn,mn,sn->mrs", a, other.square(), a)
    scale = normal.diagonal(dim1=1, dim2=2).mean(1)
    scale = torch.where(scale > 1e-200, 1e-12 * scale, 1.0)
    step: Tensor = torch.linalg.solve(normal + scale[:, None, None] * ridge, (residual @ a.T)[..., None])[..., 0]
    return step


def _from_svd(start: Factorization, rank: int) -> dict[str, Tensor]:
    """The best rank-r matrix, times ones whose other components are there but weigh nothing yet."""
    u, v = start.factors["U"], unfolded(start.factors["V"])
    ones_b, ones_a = torch.zeros_like(u), v.clone()
    ones_b[:, 0], ones_a[0] = 1.0, 1.0
    return {"B1": u, "A1": v, "B2": ones_b, "A2": ones_a}


def _from_roots(w: Tensor, rank: int) -> dict[str, Tensor]:
    half = w.abs().sqrt()
    out: dict[str, Tensor] = {}
    for i, matrix in enumerate((torch.sign(w) * half, half), start=1):
        low = svd.decompose(matrix, rank)
        out |= {f"B{i}": low.factors["U"], f"A{i}": low.factors["V"]}
    return out


def _rebalanced(f: Mapping[str, Tensor], rank: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Give the two products equal norms, and within each the two sides; the A take the kernel's axes back."""
    out = dict(f)
    norms = [float((f[f"B{i}"] @ f[f"A{i}"]).norm()) for i in (1, 2)]
    if min(norms) > 0:
        ratio = (norms[1] / norms[0]) ** 0.5
        out["B1"], out["B2"] = out["B1"] * ratio, out["B2"] / ratio
    for i in (1, 2):
        b, a = float(out[f"B{i}"].norm()), float(out[f"A{i}"].norm())
        if min(a, b) > 0:
            out[f"B{i}"], out[f"A{i}"] = out[f"B{i}"] * (a / b) ** 0.5, out[f"A{i}"] * (b / a) ** 0.5
        out[f"A{i}"] = out[f"A{i}"].reshape(rank, *shape[1:])
    return out


def curve(weight: Tensor, statistics: Statistics | None = None) -> list[Point]:
    """Return a few ranks with the losses that were reached."""
    return measured(_NAME, weight, statistics)


def to_tensor(factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    first, second = (factors[f"B{i}"] @ unfolded(factors[f"A{i}"]) for i in (1, 2))
    return (first * second).reshape(shape)


def _weight(factors: Mapping[str, Tensor]) -> Tensor:
    return to_tensor(factors, (len(factors["B1"]), *factors["A1"].shape[1:]))


def linear(factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(x, _weight(factors))


def conv(factors: Mapping[str, Tensor], x: Tensor, geometry: ConvGeometry) -> Tensor:
    return convolve(x, _weight(factors), geometry)


def embedding(factors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Rebuild the rows that are asked for, and no others."""
    first = F.embedding(ids, factors["B1"]) @ factors["A1"]
    return first * (F.embedding(ids, factors["B2"]) @ factors["A2"])
