"""Tensor train of a matrix over three digits per side: for very large tables, where two digits (Kronecker) are too few.

Rows m = m₁m₂m₃ and columns n = n₁n₂n₃ are paired digit by digit; W becomes a chain of cores (r, mₖ, nₖ, r'). TT-SVD
(TensorLy) truncates one unfolding after the other: the squared error is the sum of what the truncations drop, at most
the sum and at least the largest of the unfoldings' own tails. With moments, the cores are then refitted in turn.

Source: Oseledets 2011 (TT-SVD); Novikov et al., arXiv 1509.06569 (the matrix form).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import tensorly as tl
import torch
from tensorly.decomposition import tensor_train as tt_svd
from torch import Tensor

from ._curves import measured
from ._refit import sweep
from ._types import Factorization, Point, Rank, Statistics

LAYERS = frozenset({"linear", "embedding"})
_NAME = __name__.rpartition(".")[2]
#: Two cores are a Kronecker sum already; three pay for very large tables only.
AUTO = False
_CORES = ("G0", "G1", "G2")
_GRID = (0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)


def digits(n: int) -> tuple[int, int, int]:
    """Return three factors of n whose sum is least, ascending."""
    best = (1, 1, n)
    for a in range(1, round(n ** (1 / 3)) + 2):
        if n % a:
            continue
        for b in range(a, math.isqrt(n // a) + 1):
            if (n // a) % b == 0 and a + b + n // a // b < sum(best):
                best = (a, b, n // a // b)
    return best


def _grid(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return (mₖ, nₖ) per core; the long digits of the two sides stand at opposite ends, which evens the cores out."""
    return list(zip(digits(shape[0]), reversed(digits(shape[1])), strict=True))


def _limits(shape: tuple[int, ...]) -> tuple[int, int]:
    a, b, c = (m * n for m, n in _grid(shape))
    return min(a, b * c), min(a * b, c)


def full_rank(shape: tuple[int, ...]) -> int:
    return max(_limits(shape))


def clip(shape: tuple[int, ...], n: int) -> int:
    return min(n, full_rank(shape))


def _bonds(shape: tuple[int, ...], rank: Rank) -> tuple[int, int]:
    assert isinstance(rank, int)
    first, second = (min(rank, limit) for limit in _limits(shape))
    _, (m1, n1), (m2, n2) = _grid(shape)
    # A bond wider than what the other one and the core between can carry would hold zeros.
    first = min(first, m1 * n1 * second)
    return first, min(second, first * m1 * n1, m2 * n2)


def n_params(shape: tuple[int, ...], rank: Rank) -> int:
    r1, r2 = _bonds(shape, rank)
    (m0, n0), (m1, n1), (m2, n2) = _grid(shape)
    return m0 * n0 * r1 + r1 * m1 * n1 * r2 + r2 * m2 * n2


def n_macs(shape: tuple[int, ...], rank: Rank, positions: int) -> int:
    """Count the products in the order that `linear` makes them: the last digit first."""
    r1, r2 = _bonds(shape, rank)
    (m0, n0), (m1, n1), (m2, n2) = _grid(shape)
    last = n0 * n1 * n2 * r2 * m2
    middle = n0 * m2 * (n1 * r2) * (r1 * m1)
    return positions * (last + middle + m1 * m2 * (n0 * r1) * m0)


def decompose(weight: Tensor, rank: Rank, statistics: Statistics | None = None) -> Factorization:
    """Return the cores `G0` (m₁, n₁, r₁), `G1` (r₁, m₂, n₂, r₂), `G2` (r₂, m₃, n₃) of `weight` (out, in)."""
    shape = tuple(weight.shape)
    if weight.dim() != 2:
        raise ValueError(f"expected a matrix, got shape {shape}")
    if not isinstance(rank, int) or not 1 <= rank <= full_rank(shape):
        raise ValueError(f"expected a rank in 1…{full_rank(shape)}, got {rank}")
    if statistics is not None:
        statistics.check(weight)
    w = weight.double()
    grid, bonds = _grid(shape), _bonds(shape, rank)
    with tl.backend_context("pytorch", local_threadsafe=True):
        train = tt_svd(_paired(w, grid), rank=[1, *bonds, 1])
    shapes = ((*grid[0], bonds[0]), (bonds[0], *grid[1], bonds[1]), (bonds[1], *grid[2]))
    factors = {n: core.reshape(s) for n, core, s in zip(_CORES, train.factors, shapes, strict=True)}
    if statistics is not None and statistics.sides != (None, None):
        factors = sweep(lambda f: to_tensor(f, shape), factors, w, statistics, names=_CORES, sweeps=2)
    return Factorization.of(_NAME, factors, weight, rank, statistics)


def _paired(w: Tensor, grid: list[tuple[int, int]]) -> Tensor:
    """Return W (m, n) as (m₁n₁, m₂n₂, m₃n₃)."""
    rows, columns = [m for m, _ in grid], [n for _, n in grid]
    return w.reshape(*rows, *columns).permute(0, 3, 1, 4, 2, 5).reshape([m * n for m, n in grid])


def curve(weight: Tensor, statistics: Statistics | None = None) -> list[Point]:
    """Return a few ranks with the losses that were reached."""
    return measured(_NAME, weight, statistics, shares=_GRID)


def to_tensor(factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    return torch.einsum("aip,pbjq,qck->abcijk", *(factors[n] for n in _CORES)).reshape(shape)


def linear(factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    g0, g1, g2 = (factors[n] for n in _CORES)
    z = x.reshape(*x.shape[:-1], g0.shape[1], g1.shape[2], g2.shape[2])
    z = torch.einsum("...ijk,qck->...ijqc", z, g2)
    z = torch.einsum("...ijqc,pbjq->...ipbc", z, g1)
    y = torch.einsum("...ipbc,aip->...abc", z, g0)
    return y.reshape(*x.shape[:-1], -1)


def embedding(factors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Row a·m₂m₃ + b·m₃ + c is the product of the cores at its digits."""
    g0, g1, g2 = (factors[n] for n in _CORES)
    m1, m2 = g1.shape[1], g2.shape[1]
    a = torch.div(ids, m1 * m2, rounding_mode="floor")
    b = torch.remainder(torch.div(ids, m2, rounding_mode="floor"), m1)
    c = torch.remainder(ids, m2)
    rows = torch.einsum("...ip,...pjq,...qk->...ijk", g0[a], g1.transpose(0, 1)[b], g2.transpose(0, 1)[c])
    return rows.reshape(*ids.shape, -1)
