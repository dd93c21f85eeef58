"""Spatial SVD of a 2-D convolution: k_h×1 to r channels, then 1×k_w, or the other way round, whichever errs less.

The weight as a matrix with rows (out, w) and columns (in, h) has rank r; without moments the SVD of that matrix is the
best. With them, the better of two SVDs in a product metric is where alternating least squares in the whole metric
starts (`_filters`).

Source: Jaderberg et al., arXiv 1405.3866 (the layer pair).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ._curves import ranks_to
from ._filters import Fit, View, fits
from ._linalg import convolve
from ._memo import Memo
from ._types import ConvGeometry, Factorization, Point, Rank, Statistics

LAYERS = frozenset({"conv"})
_NAME = __name__.rpartition(".")[2]


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


def factor_shapes(shape: tuple[int, ...], rank: Rank) -> dict[str, tuple[int, ...]]:
    """Return the shapes with the vertical filters first; which way round is better depends on the weight."""
    assert isinstance(rank, int)
    out, inner, kh, kw = _axes(shape)
    flat = (1,) * (len(shape) - 3)
    return {"first": (rank, inner, kh, *flat), "second": (out, rank, *flat, kw)}


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
    [fit] = fits(_views(weight, statistics or Statistics()), [rank])
    return Factorization.of(_NAME, filters(fit, shape), weight, rank, statistics)


def _views(weight: Tensor, metric: Statistics) -> list[View]:
    """Vertical first; for square kernels (equal size both ways) also horizontal first."""
    w = weight.double().reshape(_axes(tuple(weight.shape)))
    return [View.of(w, metric, swap=swap) for swap in ((False, True) if w.shape[2] == w.shape[3] else (False,))]


def filters(fit: Fit, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the two banks of a fit as `first` and `second` for a weight of this shape."""
    rank, (_, inner, kh, kw) = len(fit.a), _axes(shape)
    first, second = fit.a.reshape(rank, inner, kw if fit.swap else kh, 1), fit.b[:, :, None]
    if fit.swap:
        first, second = first.transpose(2, 3), second.transpose(2, 3)
    if len(shape) == 3:
        first, second = first[..., 0], second[..., 0]
    return {"first": first, "second": second}


def _offered(weight: Tensor, metric: Statistics) -> list[Fit]:
    """Return the fits of a grid of ranks: as long as the same kernel without redundancy is below dense."""
    shape = tuple(weight.shape)
    out, inner, kh, kw = _axes(shape)
    # r·in·k_h + out·r(k_w − 1) < out·in·k_h·k_w, from `pivoted_spatial`
    most = max(1, min(full_rank(shape), out * inner * kh * kw // (inner * kh + out * (kw - 1))))
    return list(fits(_views(weight, metric), ranks_to(most, 20)))


#: The fits that the last curve was made of.
offered = Memo(_offered)


def curve(weight: Tensor, statistics: Statistics | None = None) -> list[Point]:
    """Return a grid of ranks with the losses that `decompose` reaches."""
    shape = tuple(weight.shape)
    return [Point(len(f.a), n_params(shape, len(f.a)), f.loss) for f in offered(weight, statistics)]


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
