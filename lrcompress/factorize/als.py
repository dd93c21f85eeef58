"""Alternating least squares, W ≈ U V: for missing entries, entry weights and a ridge, where no closed form exists.

Without any of these the best U V is the truncated SVD, and that is what is returned. With moments, a few sweeps of
exact half steps go from the plain SVD towards the weighted one. With entry weights Ω (0: missing), every row of U and
every column of V is its own small least-squares problem.

    als.decompose(w, 8, entry_weights=fisher, ridge=1e-3)

Source: f = ‖√Ω∘(W − U V)‖² + λ(‖U‖² + ‖V‖²), normal equations per row and column; survey in arXiv 2408.05883. For
Ω = 1 the limit is the soft-thresholded SVD σ → max(σ − λ, 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import svd
from ._curves import measured
from ._linalg import fix_signs, unfolded
from ._types import Factorization, Point, Rank, Statistics

LAYERS = frozenset({"linear", "conv", "embedding"})
_NAME = __name__.rpartition(".")[2]
#: Ends where the SVD form begins: never a default.
AUTO = False
_SWEEPS, _ENTRY_SWEEPS = 8, 200

full_rank, clip, n_params, n_macs = svd.full_rank, svd.clip, svd.n_params, svd.n_macs
# U V is U V, however it was found.
to_tensor, linear, conv, embedding = svd.to_tensor, svd.linear, svd.conv, svd.embedding


def decompose(
    weight: Tensor,
    rank: Rank,
    statistics: Statistics | None = None,
    *,
    entry_weights: Tensor | None = None,
    ridge: float = 0.0,
) -> Factorization:
    """Return `U` (out, r) and `V` (r, in, *k). `entry_weights`: like `weight`, 0 where an entry is missing.

    Raises `ValueError` for weights that are negative or misshapen, and for missing entries without a ridge.
    """
    if statistics is not None:
        statistics.check(weight)
    if not isinstance(rank, int) or not 1 <= rank <= full_rank(tuple(weight.shape)):
        raise ValueError(f"expected a rank in 1…{full_rank(tuple(weight.shape))}, got {rank}")
    w = unfolded(weight).double()
    if entry_weights is not None:
        u, v = _masked(w, rank, _checked(entry_weights, weight, ridge), ridge)
    else:
        plain = svd.decompose(weight.double(), rank)
        u, v = plain.factors["U"], unfolded(plain.factors["V"])
        if ridge > 0:
            u, v = _soft(u, v, ridge)
        elif statistics is not None and statistics.sides != (None, None):
            u, v = _weighted(w, u, v, statistics)
    u, flipped = fix_signs(u, v)
    assert flipped is not None
    return Factorization.of(_NAME, {"U": u, "V": flipped.reshape(rank, *weight.shape[1:])}, weight, rank, statistics)


def _checked(entry_weights: Tensor, weight: Tensor, ridge: float) -> Tensor:
    if entry_weights.shape != weight.shape:
        raise ValueError(f"entry_weights: expected shape {tuple(weight.shape)}, got {tuple(entry_weights.shape)}")
    omega = unfolded(entry_weights).double()
    if not torch.isfinite(omega).all() or float(omega.min()) < 0:
        raise ValueError("entry_weights: expected finite numbers of at least 0")
    if float(omega.min()) == 0 and not ridge > 0:
        raise ValueError("entry_weights: expected a ridge above 0 where entries are missing, got 0")
    return omega


def _soft(u: Tensor, v: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return the limit for Ω = 1 in closed form: singular values less the ridge, spread evenly."""
    q, r = torch.linalg.qr(u)
    p, d, qt = torch.linalg.svd(r @ v, full_matrices=False)
    roots = (d - ridge).clamp_min(0).sqrt()
    return q @ (p * roots), roots[:, None] * qt


def _weighted(w: Tensor, u: Tensor, v: Tensor, metric: Statistics) -> tuple[Tensor, Tensor]:
    """Half steps in the full metric: each is exact for the other factor fixed, whatever the metric of its own side."""
    left, right = metric.sides

    def times_right(x: Tensor) -> Tensor:
        return x if right is None else x @ right

    def times_left(x: Tensor) -> Tensor:
        if left is None:
            return x
        return left[:, None] * x if left.dim() == 1 else left @ x

    best, lowest = (u, v), metric.loss(w - u @ v)
    for _ in range(_SWEEPS):
        vs = times_right(v)
        u = u + _solve(vs @ v.T, (vs @ (w - u @ v).T)).T
        lu = times_left(u)
        v = v + _solve(lu.T @ u, lu.T @ (w - u @ v))
        loss = metric.loss(w - u @ v)
        if not loss < lowest:
            break
        best, lowest = (u, v), loss
    return best


def _solve(normal: Tensor, right: Tensor) -> Tensor:
    """Solve a PSD system whose null space, where the right side is zero too, stays untouched."""
    scale = normal.diagonal().mean()
    if not float(scale) > 0:
        return torch.zeros_like(right)
    damped = normal + 1e-12 * scale * torch.eye(len(normal), dtype=normal.dtype)
    solved: Tensor = torch.linalg.lstsq(damped, right, driver="gelsd").solution
    return solved


def _masked(w: Tensor, rank: int, omega: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return U, V of the weighted problem, from the SVD of the matrix with its missing entries at the mean."""
    seen = omega > 0
    mean = w[seen].mean() if bool(seen.any()) else torch.zeros((), dtype=w.dtype)
    w = torch.where(seen, w, mean)
    p, d, qt = torch.linalg.svd(w, full_matrices=False)
    u, v = p[:, :rank] * d[:rank].sqrt(), d[:rank, None].sqrt() * qt[:rank]
    eye = ridge * torch.eye(rank, dtype=w.dtype)
    before = _objective(w, u, v, omega, ridge)
    for _ in range(_ENTRY_SWEEPS):
        v = torch.linalg.solve(
            torch.einsum("mr,mn,ms->nrs", u, omega, u) + eye, torch.einsum("mr,mn->nr", u, omega * w)
        ).T
        u = torch.linalg.solve(
            torch.einsum("rn,mn,sn->mrs", v, omega, v) + eye, torch.einsum("rn,mn->mr", v, omega * w)
        )
        after = _objective(w, u, v, omega, ridge)
        if not after < before * (1 - 1e-10):
            break
        before = after
    return u, v


def _objective(w: Tensor, u: Tensor, v: Tensor, omega: Tensor, ridge: float) -> float:
    return float((omega * (w - u @ v).square()).sum() + ridge * (u.square().sum() + v.square().sum()))


def curve(weight: Tensor, statistics: Statistics | None = None) -> list[Point]:
    """Return a few ranks with the losses that were reached."""
    return measured(_NAME, weight, statistics)
