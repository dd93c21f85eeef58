"""Tucker-2 of a convolution, W ≈ Z ×₀ U_out ×₁ U_in: 1×1, k×k on few channels, 1×1.

TensorLy's partial Tucker (HOOI) gives the plain decomposition. With moments, U_in comes from the weight scaled by the
root of the channel covariance, with or without that of the taps, and (U_out, Z) are then the exact joint optimum of
E‖(W − Ŵ)p‖²_G for that U_in: it is the SVD form applied to the projected patches z = (U_in ⊗ I)ᵀ p. A further
round of updates, U_in too, gained 2 % of the loss on ResNet-20 at ten times the work, and no curve could promise it.

Source: Tucker 1966, De Lathauwer et al. 2000 (HOOI), Kim et al., arXiv 1511.06530 (the layer chain).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import tensorly as tl
import torch
import torch.nn.functional as F
from tensorly.decomposition import partial_tucker
from torch import Tensor

from ._curves import ranks_to
from ._linalg import cholesky, convolve, fix_signs, pointwise, root, top_eigenvectors, unfolded
from ._memo import Memo
from ._types import ConvGeometry, Factorization, Point, Rank, Statistics
from .kronecker import nearest_kronecker

LAYERS = frozenset({"conv"})
_NAME = __name__.rpartition(".")[2]
#: About how many ranks per side the allocator may choose from.
_POINTS = 16
_RIDGE = 1e-13


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


def factor_shapes(shape: tuple[int, ...], rank: Rank) -> dict[str, tuple[int, ...]]:
    out, inner = _pair(rank)
    return {"O": (shape[0], out), "core": (out, inner, *shape[2:]), "I": (inner, shape[1])}


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
        u_out, u_in, core = _weighted(w, out, inner, statistics)
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


def _input_bases(w: Tensor, inner: int, metric: Statistics) -> list[Tensor]:
    """Return orthonormal U_in (in, R_in), best first: leading channel directions of the metric-scaled weight.

    S is taken as S_I ⊗ S_K: as the mean over the taps with S_K = 1, and as the nearest product of that kind.
    """
    channels, kernel = w.shape[1], math.prod(w.shape[2:])
    lw = unfolded(w) if metric.g is None else cholesky(metric.g).T @ unfolded(w)
    lw = lw.reshape(len(w), channels, kernel)
    if metric.s is None:
        return [top_eigenvectors(torch.einsum("oik,ojk->ij", lw, lw), inner)[1]]
    mean = torch.einsum("ikjk->ij", metric.s.reshape(channels, kernel, channels, kernel)) / kernel
    near, taps = nearest_kronecker(metric.s, channels, kernel)
    bases = []
    for own, between in ((mean, None), (near, taps)):
        half, inverse = root(own)
        scaled = torch.einsum("oik,ij->ojk", lw, half)
        weighted = scaled if between is None else scaled @ between
        _, basis = top_eigenvectors(torch.einsum("oik,ojk->ij", scaled, weighted), inner)
        # The scaled weight lives in S_I^{1/2} coordinates: its row space there is S_I^{-1/2} of the one we need.
        back, _ = torch.linalg.qr(inverse @ basis)
        bases.append(fix_signs(back)[0])
    return bases


@dataclass(frozen=True)
class _Projected:
    """A kernel seen through an input basis: X = L⁻¹ Qᵀ S Wᵀ with Qᵀ S Q = L Lᵀ, Q = U_in ⊗ I, (R_in·k², out).

    Heads of the basis have the leading blocks of L, so that Kₚ = Xₚᵀ Xₚ of every R_in is a running sum.
    """

    u_in: Tensor
    root: Tensor
    x: Tensor
    left: Tensor | None
    total: float

    @classmethod
    def of(cls, w: Tensor, u_in: Tensor, metric: Statistics) -> _Projected:
        channels, kernel, inner = w.shape[1], math.prod(w.shape[2:]), u_in.shape[1]
        flat = unfolded(w)
        left = None if metric.g is None else cholesky(metric.g)
        eye = torch.eye(inner * kernel, dtype=w.dtype)
        if metric.s is None:
            ws, chol = flat, eye
        else:
            ws = flat @ metric.s
            sq = torch.einsum("ikjl,jr->ikrl", metric.s.reshape(channels, kernel, channels, kernel), u_in)
            qsq = torch.einsum("ikrl,is->skrl", sq, u_in).reshape(inner * kernel, -1)
            chol = cholesky(qsq + _RIDGE * qsq.diagonal().mean() * eye)
        wsq = torch.einsum("oik,ir->rko", ws.reshape(-1, channels, kernel), u_in).reshape(inner * kernel, -1)
        x = torch.linalg.solve_triangular(chol, wsq, upper=False)
        gw = flat if left is None else left @ (left.T @ flat)
        return cls(u_in, chol, x if left is None else x @ left, left, float((gw * ws).sum()))

    def losses(self) -> Tensor:
        """Return the loss of every (R_in, R_out): what the leading eigenvalues of each K leave, (in, out)."""
        blocks = self.x.reshape(self.u_in.shape[1], -1, self.x.shape[1])
        k = (blocks.transpose(1, 2) @ blocks).cumsum(0)
        kept: Tensor = torch.linalg.eigvalsh(k).flip(1).clamp_min(0).cumsum(1)
        return (self.total - kept).clamp_min(0)

    def fitted(self, out: int) -> tuple[Tensor, Tensor]:
        """Return (U_out, core), the exact joint optimum for the whole of U_in, core (R_out, R_in·k²)."""
        _, p = top_eigenvectors(self.x.T @ self.x, out)
        core = torch.linalg.solve_triangular(self.root.T, self.x @ p, upper=True).T
        return p if self.left is None else torch.linalg.solve_triangular(self.left.T, p, upper=True), core


def _weighted(w: Tensor, out: int, inner: int, metric: Statistics) -> tuple[Tensor, Tensor, Tensor]:
    """Return U_out (out, R_out), U_in (in, R_in) and the core: the better of the input bases with its exact optimum."""
    seen = [_Projected.of(w, u_in, metric) for u_in in _input_bases(w, inner, metric)]
    best = min(seen, key=lambda p: p.total - float(torch.linalg.eigvalsh(p.x.T @ p.x).flip(0)[:out].sum()))
    u_out, core = best.fitted(out)
    return u_out, best.u_in, core.reshape(out, inner, *w.shape[2:])


def _losses(weight: Tensor, metric: Statistics) -> Tensor:
    """Return the loss of every (R_in, R_out), the better of the input bases."""
    w = weight.double()
    bases = _input_bases(w, full_rank(tuple(w.shape))[1], metric)
    return torch.stack([_Projected.of(w, u_in, metric).losses() for u_in in bases]).amin(0)


_KEPT = Memo(_losses)


def curve(weight: Tensor, statistics: Statistics | None = None) -> list[Point]:
    """Return a grid of ranks with their losses: all of them come from one projection per input basis.

    Without a metric they are those of HOSVD, which HOOI lowers by some percent.
    """
    shape = tuple(weight.shape)
    (top_out, top_in), kernel = full_rank(shape), math.prod(shape[2:])
    losses = _KEPT(weight, statistics)
    return [
        Point((o, i), n_params(shape, (o, i)), float(losses[i - 1, o - 1]))
        for i in ranks_to(top_in, _POINTS)
        for o in ranks_to(top_out, _POINTS)
        if o <= i * kernel and i <= o * kernel
    ]


def to_tensor(factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    return torch.einsum("oa,ai...,ij->oj...", factors["O"], factors["core"], factors["I"]).reshape(shape)


def conv(factors: Mapping[str, Tensor], x: Tensor, geometry: ConvGeometry) -> Tensor:
    return pointwise(convolve(pointwise(x, factors["I"]), factors["core"], geometry), factors["O"])
