"""Spatial SVD of a 2-D convolution: k_h×1 to r channels, then 1×k_w, or the other way round, whichever errs less.

The weight as a matrix with rows (out, w) and columns (in, h) has rank r. With moments, the first filters come from
the SVD form under the covariance of one column of the patch, and the second are refitted to the whole patch:
B = W S Φᵀ (Φ S Φᵀ)⁻¹ with Φ = A ⊗ I. The refit is the exact optimum for given first filters, whatever the output
metric.

Source: Jaderberg et al., arXiv 1405.3866 (the layer pair).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import svd
from ._curves import measured
from ._linalg import convolve, fix_signs
from ._types import ConvGeometry, Factorization, Point, Rank, Statistics

LAYERS = frozenset({"conv"})
_NAME = __name__.rpartition(".")[2]
#: Shares of the full rank that the allocator may choose from.
_GRID = (0.04, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.85, 1.0)


def serves(shape: tuple[int, ...]) -> bool:
    """Two spatial axes, both longer than one."""
    return len(shape) == 4 and min(shape[2:]) > 1


def full_rank(shape: tuple[int, ...]) -> int:
    out, inner, kh, kw = _axes(shape)
    return min(inner * kh, out * kw)


def _axes(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Return (out, in, k_h, k_w); shapes of fewer spatial axes count as k_w = 1."""
    out, inner, *kernel = shape
    return out, inner, kernel[0], kernel[1] if len(kernel) > 1 else 1


def clip(shape: tuple[int, ...], n: int) -> int:
    return min(n, full_rank(shape))


def n_params(shape: tuple[int, ...], rank: Rank) -> int:
    assert isinstance(rank, int)
    out, inner, kh, kw = _axes(shape)
    return rank * (inner * kh + out * kw)


def n_macs(shape: tuple[int, ...], rank: Rank, positions: int) -> int:
    return n_params(shape, rank) * positions


def decompose(weight: Tensor, rank: Rank, statistics: Statistics | None = None) -> Factorization:
    """Return `first` and `second` filters of `weight` (out, in, k_h, k_w), or of (out, in, k), for which k_w is 1.

    Shapes: (r, in, k_h, 1) and (out, r, 1, k_w), or (r, in, 1, k_w) and (out, r, k_h, 1).
    """
    shape = tuple(weight.shape)
    if not 3 <= len(shape) <= 4:
        raise ValueError(f"expected a convolution over one or two axes, got shape {shape}")
    if not isinstance(rank, int) or not 1 <= rank <= full_rank(shape):
        raise ValueError(f"expected a rank in 1…{full_rank(shape)}, got {rank}")
    if statistics is not None:
        statistics.check(weight)
    metric = statistics or Statistics()
    best: tuple[float, dict[str, Tensor]] | None = None
    w = weight.double().reshape(_axes(shape))
    for swap in _orders(shape):
        first, second = _pair(w, rank, metric, swap=swap)
        factors = {"first": first, "second": second}
        loss = metric.loss(weight.double() - to_tensor(factors, shape))
        if best is None or loss < best[0]:
            best = loss, factors
    assert best is not None
    factors = best[1]
    if len(shape) == 3:
        factors = {k: v[..., 0] for k, v in factors.items()}
    return Factorization.of(_NAME, factors, weight, rank, statistics)


def _orders(shape: tuple[int, ...]) -> tuple[bool, ...]:
    """Vertical first; for square kernels (equal size both ways) also horizontal first."""
    _, _, kh, kw = _axes(shape)
    return (False, True) if kh == kw else (False,)


def _pair(w: Tensor, rank: int, metric: Statistics, *, swap: bool) -> tuple[Tensor, Tensor]:
    """Return the two filter banks for one order; `swap` exchanges the roles of height and width."""
    s = metric.s
    out, inner, kh, kw = w.shape
    if swap:
        w = w.transpose(2, 3)
        if s is not None:
            s = s.reshape(inner, kh, kw, inner, kh, kw).permute(0, 2, 1, 3, 5, 4).reshape(len(s), -1)
        kh, kw = kw, kh
    rows = w.permute(0, 3, 1, 2).reshape(out * kw, inner * kh)
    scaled = rows
    if metric.g is not None:
        left = torch.linalg.cholesky(metric.g)
        scaled = torch.einsum("po,pwn->own", left, rows.reshape(out, kw, -1)).reshape(out * kw, -1)
    column = None
    if s is not None:
        column = torch.einsum("iwjw->ij", s.reshape(inner * kh, kw, inner * kh, kw)) / kw
    _, a, _ = svd._factors(scaled, rank, Statistics(gram=column))
    a = a / a.norm(dim=1, keepdim=True).clamp_min(1e-300)
    flat, _ = fix_signs(a.T)
    a = flat.T
    b = torch.linalg.lstsq(a.T, rows.T, driver="gelsd").solution.T.reshape(out, kw, rank)
    b = b.permute(0, 2, 1).reshape(out, rank * kw)
    if s is not None:
        b = _refit(w.reshape(out, -1), a, b, s, kw)
    first, second = a.reshape(rank, inner, kh, 1), b.reshape(out, rank, 1, kw)
    return (first.transpose(2, 3), second.transpose(2, 3)) if swap else (first, second)


def _refit(w: Tensor, a: Tensor, b: Tensor, s: Tensor, kw: int) -> Tensor:
    """Return the optimal second filters for given first ones; a small ridge keeps `b` where no input reaches."""
    n = a.shape[1]
    ws = (w @ s).reshape(len(w), n, kw)
    right = torch.einsum("onw,rn->orw", ws, a).reshape(len(w), -1)
    phi_s = torch.einsum("rn,nwm->rwm", a, s.reshape(n, kw, -1)).reshape(len(a), kw, n, kw)
    normal = torch.einsum("rwnv,qn->rwqv", phi_s, a).reshape(len(a) * kw, -1)
    ridge = 1e-9 * float(normal.diagonal().mean())
    if not ridge > 0:
        return b
    raised = normal + ridge * torch.eye(len(normal), dtype=normal.dtype)
    solved: Tensor = torch.linalg.solve(raised, (right + ridge * b).T)
    return solved.T


def curve(weight: Tensor, statistics: Statistics | None = None) -> list[Point]:
    """Return a grid of ranks with their measured losses."""
    return measured(_NAME, weight, statistics, shares=_GRID)


def to_tensor(factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    first, second = factors["first"], factors["second"]
    if first.dim() == 3:
        first, second = first[..., None], second[..., None]
    return torch.einsum("rihw,oruv->oihuwv", first, second).reshape(shape)


def conv(factors: Mapping[str, Tensor], x: Tensor, geometry: ConvGeometry) -> Tensor:
    """Each bank walks along its own axis only."""
    first, second = factors["first"], factors["second"]
    if first.dim() == 3:
        return convolve(convolve(x, first, geometry), second, ConvGeometry.default(1))
    axis = 0 if first.shape[3] == 1 and (first.shape[2] > 1 or second.shape[2] == 1) else 1
    return convolve(convolve(x, first, only(geometry, axis)), second, only(geometry, 1 - axis))


def only(geometry: ConvGeometry, axis: int) -> ConvGeometry:
    """Return the part of the walk that is along one axis."""

    def keep(values: tuple[int, ...], neutral: int) -> tuple[int, ...]:
        return tuple(v if i == axis else neutral for i, v in enumerate(values))

    return ConvGeometry(keep(geometry.stride, 1), keep(geometry.padding, 0), keep(geometry.dilation, 1))
