"""Sum of Kronecker products, W ≈ Σ_k B_k ⊗ C_k, globally optimal by the SVD of the rearranged weight.

R(W) puts block (i, j) of W into row i·n₁+j; then ‖W − Σ B_k ⊗ C_k‖ = ‖R(W) − Σ vec(B_k) vec(C_k)ᵀ‖. With moments,
S is replaced by its nearest Kronecker product S₁ ⊗ S₂ (fitted by the same rearrangement), the weighted problem is
solved exactly for it, and the leading B_k are refitted to the full S for the C_k found. A convolution splits channels and
keeps the kernel in C: (O₁, I₁) ⊗ (O₂, I₂, *k).

Source: Van Loan & Pitsianis 1993; the refit is the normal equation of the linear least-squares problem in B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ._linalg import cholesky, convolve, fix_signs, root, top_eigenvectors, unfolded
from ._types import ConvGeometry, Factorization, Point, Rank, Statistics

LAYERS = frozenset({"linear", "conv", "embedding"})
_NAME = __name__.rpartition(".")[2]
#: Unknowns of each row of all B that are refitted at once; further terms stay as they are.
_REFIT_LIMIT = 1024
#: Above this size the SVD of R(W) is taken from its Gram matrix.
_SQUARE_BEYOND = 256
#: Shares of the most terms below dense that a curve in a metric offers.
_SHARES = (0.05, 0.15, 0.3, 0.5, 0.75, 1.0)
_POWER_STEPS = 100


def split(n: int) -> tuple[int, int]:
    """Return the factors (a, b) of n = a·b nearest to each other, a ≤ b."""
    a = next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
    return a, n // a


def blocks(shape: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (m₁, n₁) and (m₂, n₂) of the split with the fewest numbers per term; n counts in·kernel.

    Of equal ones the squarest blocks are taken: the extreme, a column times a row, would be the SVD again.
    """
    kernel = math.prod(shape[2:])
    best: tuple[tuple[int, float], tuple[int, int], tuple[int, int]] | None = None
    for m1 in _divisors(shape[0]):
        for n1 in _divisors(shape[1]):
            m2, n2 = shape[0] // m1, shape[1] // n1 * kernel
            cost = m1 * n1 + m2 * n2, max(m1 / n1, n1 / m1) * max(m2 / n2, n2 / m2)
            if (m1, n1) != (1, 1) and (m2, n2) != (1, 1) and (best is None or cost < best[0]):
                best = cost, (m1, n1), (m2, n2)
    if best is None:
        return (1, 1), (shape[0], shape[1] * kernel)
    return best[1], best[2]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def full_rank(shape: tuple[int, ...]) -> int:
    (m1, n1), (m2, n2) = blocks(shape)
    return min(m1 * n1, m2 * n2)


def clip(shape: tuple[int, ...], n: int) -> int:
    return min(n, full_rank(shape))


def n_params(shape: tuple[int, ...], rank: Rank) -> int:
    assert isinstance(rank, int)
    (m1, n1), (m2, n2) = blocks(shape)
    return rank * (m1 * n1 + m2 * n2)


def factor_shapes(shape: tuple[int, ...], rank: Rank) -> dict[str, tuple[int, ...]]:
    assert isinstance(rank, int)
    first, second = blocks(shape)
    return {"B": (rank, *first), "C": (rank, second[0], shape[1] // first[1], *shape[2:])}


def n_macs(shape: tuple[int, ...], rank: Rank, positions: int) -> int:
    assert isinstance(rank, int)
    return rank * positions * min(_costs(*blocks(shape), math.prod(shape[2:])))


def _costs(first: tuple[int, int], second: tuple[int, int], kernel: int) -> tuple[int, int]:
    """Return multiply-adds per term and position: C before B, and B before C."""
    (m1, n1), (m2, n2) = first, second
    return n1 * m2 * (n2 + m1), m1 * n1 * n2 // kernel + m1 * m2 * n2


def rearrange(w: Tensor, first: tuple[int, int], second: tuple[int, int]) -> Tensor:
    """Return R(W), (m₁n₁, m₂n₂), of w (m₁m₂, n₁n₂)."""
    (m1, n1), (m2, n2) = first, second
    return w.reshape(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)


def decompose(weight: Tensor, rank: Rank, statistics: Statistics | None = None) -> Factorization:
    """Return `rank` Kronecker terms of `weight`: `B` (K, m₁, n₁) and `C` (K, m₂, n₂, *k)."""
    shape = tuple(weight.shape)
    if not isinstance(rank, int) or not 1 <= rank <= full_rank(shape):
        raise ValueError(f"expected 1…{full_rank(shape)} terms, got {rank}")
    if statistics is not None:
        statistics.check(weight)
    b, c = _Terms.of(weight, rank, statistics or Statistics()).fitted(rank)
    flat, other = fix_signs(b.reshape(rank, -1).T, c.reshape(rank, -1))
    assert other is not None
    first, second = blocks(shape)
    n_channels = shape[1] // first[1]
    factors = {"B": flat.T.reshape(rank, *first), "C": other.reshape(rank, second[0], n_channels, *shape[2:])}
    return Factorization.of(_NAME, factors, weight, rank, statistics)


def curve(weight: Tensor, statistics: Statistics | None = None) -> list[Point]:
    """Return every number of terms with its loss; in a metric, a few that are below dense with their measured losses."""
    shape, metric = tuple(weight.shape), statistics or Statistics()
    full = full_rank(shape)
    if metric.sides == (None, None):
        d = _spectrum(unfolded(weight).double(), *blocks(shape), None)[1].square()
        tails = (d.sum() - d.cumsum(0)).clamp_min(0)
        return [Point(k, n_params(shape, k), float(tails[k - 1])) for k in range(1, full + 1)]
    most = max(1, min(full, math.prod(shape) // n_params(shape, 1)))
    terms = _Terms.of(weight, most, metric)
    w, points = unfolded(weight).double(), []
    for k in sorted({max(1, round(most * share)) for share in _SHARES}):
        b, c = terms.fitted(k)
        points.append(Point(k, n_params(shape, k), metric.loss((w - _product(b, c)).reshape(shape))))
    return points


@dataclass(frozen=True)
class _Terms:
    """The leading terms B (K, m₁, n₁), C (K, m₂, n₂) of a weight in the product metric; under S, what refits the first of them.

    `root`: Cholesky factor of the normal matrix that the rows of all B_k share, (k·n₁, k·n₁): its leading blocks are
    those of fewer terms. Terms beyond `_REFIT_LIMIT` unknowns stay as they are.
    """

    w: Tensor
    b: Tensor
    c: Tensor
    s: Tensor | None
    root: Tensor | None
    ridge: float

    @classmethod
    def of(cls, weight: Tensor, rank: int, metric: Statistics) -> _Terms:
        w = unfolded(weight).double()
        first, second = blocks(tuple(weight.shape))
        p, d, qt, undo = _spectrum(w, first, second, metric)
        b = (p[:, :rank] * d[:rank].sqrt()).T.reshape(rank, *first)
        c = (qt[:rank] * d[:rank, None].sqrt()).reshape(rank, *second)
        if undo is not None:
            b, c = b @ undo[0], c @ undo[1]
        s = metric.s if metric.row_weights is None else None
        lead = 0 if s is None else min(rank, _REFIT_LIMIT // first[1])
        if s is None or not lead:
            return cls(w, b, c, s, None, 0.0)
        normal = _normal(c[:lead], s, first[1])
        # Of the first term alone: a leading block must not depend on what follows.
        ridge = 1e-8 * float(normal.diagonal()[: first[1]].mean())
        if not ridge > 0:
            return cls(w, b, c, s, None, 0.0)
        return cls(w, b, c, s, cholesky(normal + ridge * torch.eye(len(normal), dtype=w.dtype)), ridge)

    def fitted(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the first `rank` terms with B refitted to the full S for the C found.

        A ridge towards the given B keeps what no input reaches.
        """
        b, c = self.b[:rank], self.c[:rank]
        if self.root is None or self.s is None:
            return b, c
        _, m1, n1 = b.shape
        _, m2, n2 = c.shape
        lead = min(rank, len(self.root) // n1)
        rest = self.w if lead == rank else self.w - _product(b[lead:], c[lead:])
        ws = (rest @ self.s).reshape(m1, m2, n1, n2)
        right = torch.einsum("pajd,kad->pkj", ws, c[:lead]).reshape(m1, lead * n1)
        start = b[:lead].permute(1, 0, 2).reshape(m1, lead * n1)
        root = self.root[: lead * n1, : lead * n1]
        solved = torch.cholesky_solve((right + self.ridge * start).T, root).T
        return torch.cat([solved.reshape(m1, lead, n1).permute(1, 0, 2), b[lead:]]), c


def _product(b: Tensor, c: Tensor) -> Tensor:
    """Return Σ_k B_k ⊗ C_k as a matrix."""
    (terms, m1, n1), (_, m2, n2) = b.shape, c.shape
    blocks_ = b.reshape(terms, -1).T @ c.reshape(terms, -1)
    return blocks_.reshape(m1, n1, m2, n2).transpose(1, 2).reshape(m1 * m2, n1 * n2)


def _normal(c: Tensor, s: Tensor, n1: int) -> Tensor:
    """Return the normal matrix of the B_k for fixed C (K, m₂, n₂): Σ_a C_k[a] S C_l[a]ᵀ block by block, (K·n₁, K·n₁)."""
    terms, m2, n2 = c.shape
    # (k, a, i, j, d) → (k, i, j, a·d) against (l, a·d)
    cs = torch.einsum("kab,ibjd->kijad", c, s.reshape(n1, n2, n1, n2))
    normal = cs.reshape(terms * n1 * n1, m2 * n2) @ c.reshape(terms, -1).T
    return normal.reshape(terms, n1, n1, terms).transpose(2, 3).reshape(terms * n1, terms * n1)


def _spectrum(
    w: Tensor, first: tuple[int, int], second: tuple[int, int], statistics: Statistics | None
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Return the SVD of R(W), or of R(W (L₁⊗L₂)) and what undoes the weighting on B and C."""
    s = None if statistics is None or statistics.row_weights is not None else statistics.s
    undo = None
    if s is not None:
        s1, s2 = nearest_kronecker(s, first[1], second[1])
        (l1, i1), (l2, i2) = root(_raised(s1)), root(_raised(s2))
        w = torch.einsum("ojd,jk,de->oke", w.reshape(len(w), first[1], second[1]), l1, l2).reshape(w.shape)
        undo = i1, i2
    r = rearrange(w, first, second)
    if min(r.shape) <= _SQUARE_BEYOND:
        p, d, qt = torch.linalg.svd(r, full_matrices=False)
        return p, d, qt, undo
    # From the smaller Gram matrix: exact to 1e-8 of the largest singular value, at a third of the time.
    flip = r.shape[0] > r.shape[1]
    squares, vectors = top_eigenvectors(r.T @ r if flip else r @ r.T, min(r.shape))
    d = squares.sqrt()
    scaled = 1 / d.clamp_min(1e-12 * d[0].clamp_min(1e-300))
    if flip:
        return (r @ vectors) * scaled, d, vectors.T, undo
    return vectors, d, scaled[:, None] * (vectors.T @ r), undo


def _raised(s: Tensor) -> Tensor:
    """Return S a little above singular: directions without input would otherwise lose their weights for good."""
    return s + 1e-6 * s.diagonal().mean() * torch.eye(len(s), dtype=s.dtype)


def nearest_kronecker(s: Tensor, n1: int, n2: int) -> tuple[Tensor, Tensor]:
    """Return PSD S₁ (n₁, n₁) and S₂ (n₂, n₂) whose Kronecker product is nearest to the PSD matrix `s`."""
    r = rearrange(s, (n1, n1), (n2, n2))
    # The leading singular pair, by power iteration from the identity: a fixed sign, and no SVD of n₁² rows.
    right = torch.eye(n2, dtype=s.dtype).reshape(-1)
    for _ in range(_POWER_STEPS):
        left = r @ right
        following = r.T @ (left / left.norm().clamp_min(1e-300))
        settled = float((following - right).norm()) <= 1e-12 * float(following.norm())
        right = following
        if settled:
            break
    left = r @ right / right.square().sum().clamp_min(1e-300)
    balance = (left.norm() / right.norm().clamp_min(1e-300)).clamp_min(1e-300).sqrt()
    s1, s2 = (left / balance).reshape(n1, n1), (right * balance).reshape(n2, n2)
    if float(s1.trace()) < 0:
        s1, s2 = -s1, -s2
    return (s1 + s1.T) / 2, (s2 + s2.T) / 2


def to_tensor(factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    return _product(factors["B"], factors["C"].flatten(2)).reshape(shape)


def linear(factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Y = Σ_k B_k X C_kᵀ with x reshaped to X (n₁, n₂), the cheaper product first."""
    b, c = factors["B"], factors["C"]
    terms, m1, n1 = b.shape
    _, m2, n2 = c.shape
    lead = x.shape[:-1]
    grid = x.reshape(*lead, n1, n2)
    c_first, b_first = _costs((m1, n1), (m2, n2), 1)
    if b_first < c_first:
        z = (b.reshape(terms * m1, n1) @ grid).reshape(*lead, terms, m1, n2)
        z = z.transpose(-3, -2).reshape(*lead, m1, terms * n2)
        return (z @ c.permute(0, 2, 1).reshape(terms * n2, m2)).reshape(*lead, m1 * m2)
    z = grid @ c.reshape(terms * m2, n2).T  # (…, n₁, K·m₂)
    z = z.reshape(*lead, n1, terms, m2).transpose(-3, -2).reshape(*lead, terms * n1, m2)
    return (b.permute(1, 0, 2).reshape(m1, terms * n1) @ z).reshape(*lead, m1 * m2)


def conv(factors: Mapping[str, Tensor], x: Tensor, geometry: ConvGeometry) -> Tensor:
    """Mix the n₁ channel groups with the B_k and convolve with the C_k, the cheaper one first."""
    b, c = factors["B"], factors["C"]
    terms, m1, n1 = b.shape
    m2, inner = c.shape[1:3]
    batch, space = x.shape[0], x.shape[2:]
    c_first, b_first = _costs((m1, n1), (m2, inner * math.prod(c.shape[3:])), math.prod(c.shape[3:]))
    if b_first < c_first:
        mixed = b.permute(1, 0, 2).reshape(m1 * terms, n1) @ x.reshape(batch, n1, -1)
        z = mixed.reshape(batch * m1, terms * inner, *space)
        # One convolution over all terms side by side: their sum is the sum over its input channels.
        y = convolve(z, c.transpose(0, 1).reshape(m2, terms * inner, *c.shape[3:]), geometry)
        return y.reshape(batch, m1 * m2, *y.shape[2:])
    z = convolve(x.reshape(batch * n1, inner, *space), c.reshape(terms * m2, *c.shape[2:]), geometry)
    out = z.shape[2:]
    z = z.reshape(batch, n1, terms, m2, -1).transpose(1, 2).reshape(batch, terms * n1, -1)
    y = b.permute(1, 0, 2).reshape(m1, terms * n1) @ z
    return y.reshape(batch, m1 * m2, *out)


def embedding(factors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Row i·m₂+i' is Σ_k B_k[i] ⊗ C_k[i']."""
    b, c = factors["B"], factors["C"]
    m2 = c.shape[1]
    rows_b = b.permute(1, 0, 2)[torch.div(ids, m2, rounding_mode="floor")]
    rows_c = c.permute(1, 0, 2)[torch.remainder(ids, m2)]
    return torch.einsum("...ki,...kj->...ij", rows_b, rows_c).flatten(-2)
