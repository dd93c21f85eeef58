"""Tucker-2 of a convolution, W ≈ Z ×₀ U_out ×₁ U_in: 1×1, k×k on few channels, 1×1.

TensorLy's partial Tucker (HOOI) gives the plain decomposition and the bases to start from. With moments, U_in comes
from the weight scaled by the root of the channel covariance, and (U_out, Z) are then the exact joint optimum of
E‖(W − Ŵ)p‖²_G for that U_in: it is the SVD form applied to the projected patches z = (U_in ⊗ I)ᵀ p.

Source: Tucker 1966, De Lathauwer et al. 2000 (HOOI), Kim et al., arXiv 1511.06530 (the layer chain).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import tensorly as tl
import torch
import torch.nn.functional as F
from tensorly.decomposition import partial_tucker
from torch import Tensor

from ._linalg import convolve, fix_signs, pointwise, root, top_eigenvectors, unfolded
from ._types import ConvGeometry, Factorization, Point, Rank, Statistics

LAYERS = frozenset({"conv"})
_NAME = __name__.rpartition(".")[2]
#: Shares of the full ranks that the allocator may choose from, per side.
_GRID = (0.125, 0.1875, 0.25, 0.3125, 0.375, 0.4375, 0.5, 0.5625, 0.625, 0.75, 0.875, 1.0)


def serves(shape: tuple[int, ...]) -> bool:
    """A kernel of more than one tap: without one, Tucker-2 is an SVD with a needless core."""
    return len(shape) > 2 and math.prod(shape[2:]) > 1


def full_rank(shape: tuple[int, ...]) -> tuple[int, int]:
    kernel = math.prod(shape[2:])
    return min(shape[0], shape[1] * kernel), min(shape[1], shape[0] * kernel)


def clip(shape: tuple[int, ...], n: int) -> tuple[int, int]:
    out, inner = full_rank(shape)
    return min(n, out), min(n, inner)


def _pair(rank: Rank) -> tuple[int, int]:
    if isinstance(rank, int) or len(rank) != 2:
        raise ValueError(f"expected ranks (out, in), got {rank}")
    return rank[0], rank[1]


def n_params(shape: tuple[int, ...], rank: Rank) -> int:
    out, inner = _pair(rank)
    return shape[1] * inner + inner * out * math.prod(shape[2:]) + out * shape[0]


def n_macs(shape: tuple[int, ...], rank: Rank, positions: int) -> int:
    return n_params(shape, rank) * positions


def decompose(weight: Tensor, rank: Rank, statistics: Statistics | None = None) -> Factorization:
    """Return `O` (out, R_out), `core` (R_out, R_in, *k) and `I` (R_in, in) of `weight` (out, in, *k)."""
    shape = tuple(weight.shape)
    if weight.dim() < 3:
        raise ValueError(f"expected a convolution weight, got shape {shape}")
    out, inner = _pair(rank)
    top = full_rank(shape)
    if not (1 <= out <= top[0] and 1 <= inner <= top[1]):
        raise ValueError(f"expected ranks in 1…{top}, got {rank}")
    if statistics is not None:
        statistics.check(weight)
    w = weight.double()
    if statistics is None or (statistics.s is None and statistics.g is None):
        u_out, u_in, core = _hooi(w, out, inner)
    else:
        u_in = _input_basis(w, inner, statistics)
        u_out, core = _joint(w, u_in, out, statistics)
    return Factorization.of(_NAME, {"O": u_out, "core": core, "I": u_in.T}, weight, (out, inner), statistics)


def _hooi(w: Tensor, out: int, inner: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return TensorLy's partial Tucker with fixed signs: O (out, R_out), I (in, R_in), core."""
    kernel = math.prod(w.shape[2:])
    # A mode of rank above what the other one and the kernel can carry holds zeros: HOOI is not asked for them.
    real = [min(out, inner * kernel), min(inner, out * kernel)]
    with tl.backend_context("pytorch", local_threadsafe=True):
        (_, (u_out, u_in)), _ = partial_tucker(w, rank=real, modes=[0, 1], init="svd", n_iter_max=50, tol=1e-9)
    u_out, u_in = (F.pad(fix_signs(u)[0], (0, n - u.shape[1])) for u, n in ((u_out, out), (u_in, inner)))
    core = torch.einsum("oi...,oa,ib->ab...", w, u_out, u_in)
    return u_out, u_in, core


def _input_basis(w: Tensor, inner: int, statistics: Statistics) -> Tensor:
    """Return an orthonormal U_in (in, R_in): leading channel directions of the metric-scaled weight."""
    channels, kernel = w.shape[1], math.prod(w.shape[2:])
    lw = unfolded(w) if statistics.g is None else torch.linalg.cholesky(statistics.g).T @ unfolded(w)
    lw = lw.reshape(len(w), channels, kernel)
    if statistics.s is None:
        _, basis = top_eigenvectors(torch.einsum("oik,ojk->ij", lw, lw), inner)
        return basis
    per_channel = torch.einsum("ikjk->ij", statistics.s.reshape(channels, kernel, channels, kernel)) / kernel
    half, inverse = root(per_channel)
    scaled = torch.einsum("oik,ij->ojk", lw, half)
    _, basis = top_eigenvectors(torch.einsum("oik,ojk->ij", scaled, scaled), inner)
    # The scaled weight lives in S^{1/2} coordinates: its row space there is S^{-1/2} of the one we need.
    back, _ = torch.linalg.qr(inverse @ basis)
    return fix_signs(back)[0]


def _joint(w: Tensor, u_in: Tensor, out: int, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Return (U_out, core), the exact optimum for a fixed orthonormal U_in."""
    channels, kernel, inner = w.shape[1], math.prod(w.shape[2:]), u_in.shape[1]
    flat = unfolded(w)
    if statistics.s is None:
        target = torch.einsum("oik,ir->ork", flat.reshape(-1, channels, kernel), u_in).reshape(len(w), -1)
        k = target @ target.T
        if statistics.g is not None:
            left = torch.linalg.cholesky(statistics.g)
            k = left.T @ k @ left
    else:
        s4 = statistics.s.reshape(channels, kernel, channels, kernel)
        sq = torch.einsum("ikjl,jr->ikrl", s4, u_in).reshape(channels * kernel, inner * kernel)
        qsq = torch.einsum("ikx,ir->rkx", sq.reshape(channels, kernel, -1), u_in).reshape(inner * kernel, -1)
        target = torch.linalg.lstsq(qsq.T, (flat @ sq).T, driver="gelsd").solution.T
        k = target @ qsq @ target.T
        if statistics.g is not None:
            left = torch.linalg.cholesky(statistics.g)
            k = left.T @ k @ left
    _, p = top_eigenvectors(k, out)
    if statistics.g is None:
        u_out, z = p, p.T @ target
    else:
        u_out, z = torch.linalg.solve_triangular(left.T, p, upper=True), p.T @ (left.T @ target)
    return u_out, z.reshape(out, inner, *w.shape[2:])


def curve(weight: Tensor, statistics: Statistics | None = None) -> list[Point]:
    """Return a grid of ranks with their exact losses: one input basis per R_in serves every R_out."""
    shape = tuple(weight.shape)
    top_out, top_in = full_rank(shape)
    metric = statistics or Statistics()
    points = []
    for inner in _ranks(top_in):
        u_in = _input_basis(weight.double(), inner, metric)
        u_out, core = _joint(weight.double(), u_in, top_out, metric)
        partial = torch.einsum("oa,ai...,ji->oj...", u_out, core, u_in)
        floor = metric.loss(weight.double() - partial)
        # Columns of U_out are ordered by what they explain: dropping the last ones adds their energy.
        energy = _energies(u_out, core, u_in, metric)
        tails = energy.sum() - energy.cumsum(0)
        kernel = math.prod(shape[2:])
        points += [
            Point((o, inner), n_params(shape, (o, inner)), floor + max(float(tails[o - 1]), 0.0))
            for o in _ranks(top_out)
            if o <= inner * kernel and inner <= o * kernel
        ]
    return points


def _energies(u_out: Tensor, core: Tensor, u_in: Tensor, metric: Statistics) -> Tensor:
    rows = torch.einsum("ai...,ji->aj...", core, u_in).reshape(len(core), -1)
    right = rows if metric.s is None else rows @ metric.s
    inner = (rows * right).sum(1)
    outer = u_out.square().sum(0) if metric.g is None else torch.einsum("oa,op,pa->a", u_out, metric.g, u_out)
    return inner * outer


def _ranks(full: int) -> list[int]:
    return sorted({max(1, round(full * share)) for share in _GRID})


def to_tensor(factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    return torch.einsum("oa,ai...,ij->oj...", factors["O"], factors["core"], factors["I"]).reshape(shape)


def conv(factors: Mapping[str, Tensor], x: Tensor, geometry: ConvGeometry) -> Tensor:
    return pointwise(convolve(pointwise(x, factors["I"]), factors["core"], geometry), factors["O"])
