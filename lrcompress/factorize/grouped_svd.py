"""SVD of every group of a grouped convolution, at one rank: a grouped k×k convolution to r per group, then a grouped 1×1.

The weight comes with its groups apart, (groups, out/groups, in/groups, *k). Each group is the SVD form under its own
moments, so the loss is the sum of the tails. One rank for all groups, because a grouped convolution has equal groups.

Source: Eckart & Young 1936, per group; the layer pair as in arXiv 2509.25136.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import svd
from ._linalg import convolve
from ._types import ConvGeometry, Factorization, Point, Rank, Statistics

LAYERS = frozenset({"grouped"})
_NAME = __name__.rpartition(".")[2]


def full_rank(shape: tuple[int, ...]) -> int:
    return svd.full_rank(shape[1:])


def clip(shape: tuple[int, ...], n: int) -> int:
    return min(n, full_rank(shape))


def n_params(shape: tuple[int, ...], rank: Rank) -> int:
    return shape[0] * svd.n_params(shape[1:], rank)


def factor_shapes(shape: tuple[int, ...], rank: Rank) -> dict[str, tuple[int, ...]]:
    return {n: (shape[0], *own) for n, own in svd.factor_shapes(shape[1:], rank).items()}


def n_macs(shape: tuple[int, ...], rank: Rank, positions: int) -> int:
    return n_params(shape, rank) * positions


def decompose(weight: Tensor, rank: Rank, statistics: Statistics | None = None) -> Factorization:
    """Return `U` (groups, out/groups, r) and `V` (groups, r, in/groups, *k)."""
    if weight.dim() < 4:
        raise ValueError(f"expected (groups, out, in, *k), got shape {tuple(weight.shape)}")
    if statistics is not None:
        statistics.check(weight)
    parts = [
        svd.decompose(w.double(), rank, None if statistics is None else statistics.group(i))
        for i, w in enumerate(weight)
    ]
    factors = {n: torch.stack([p.factors[n] for p in parts]) for n in ("U", "V")}
    return Factorization.of(_NAME, factors, weight, rank, statistics)


def curve(weight: Tensor, statistics: Statistics | None = None) -> list[Point]:
    """Return every rank with its loss: the sum over the groups."""
    shape = tuple(weight.shape)
    curves = [svd.curve(w, None if statistics is None else statistics.group(i)) for i, w in enumerate(weight)]
    return [Point(r, n_params(shape, r), sum(c[r - 1].loss for c in curves)) for r in range(1, full_rank(shape) + 1)]


def to_tensor(factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    return (factors["U"] @ factors["V"].flatten(2)).reshape(shape)


def conv(factors: Mapping[str, Tensor], x: Tensor, geometry: ConvGeometry) -> Tensor:
    u, v = factors["U"], factors["V"]
    groups, axes = len(u), x.dim() - 2
    y = convolve(x, v.flatten(0, 1), geometry, groups)
    return convolve(
        y, u.flatten(0, 1).reshape(groups * u.shape[1], -1, *(1,) * axes), ConvGeometry.default(axes), groups
    )


def apart(weight: Tensor, groups: int) -> Tensor:
    """Return the weight (out, in/groups, *k) of a grouped convolution with its groups apart."""
    return weight.reshape(groups, len(weight) // groups, *weight.shape[1:])
