"""Truncated SVD, W ≈ U V, in the metric of the statistics; on a convolution it is k×k to r, then 1×1.

With input moments S and output moments G the best rank-r weight in E‖(W − Ŵ)x‖²_G comes from one symmetric
eigenproblem (PCA of the outputs is the case G = I):

    K = Lᵀ W S Wᵀ L,  G = L Lᵀ,  P = top_r(K),  U = L⁻ᵀ P,  V = Pᵀ Lᵀ W,   loss = Σ_{i>r} λ_i(K)

S is never inverted, so singular statistics are exact too. The mean is carried by the bias. Where few of many
directions are wanted, they come from a randomized subspace iteration on the same K instead, chosen by cost.

Source: Eckart & Young 1936 (plain); Wang et al., arXiv 2403.07378, the one-sided optimum; K-FAC's two-sided
metric as in arXiv 2605.15626; Halko, Martinsson & Tropp 2011 (randomized). For embeddings the rows are weighted by
token frequency. On a convolution this is the k²→1 SVD.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ._linalg import convolve, fix_signs, pointwise, top_eigenvectors, unfolded
from ._memo import Memo
from ._types import ConvGeometry, Factorization, Point, Rank, Statistics

LAYERS = frozenset({"linear", "conv", "embedding"})
_NAME = __name__.rpartition(".")[2]
#: Directions beyond the rank, and power steps, of the randomized iteration.
OVERSAMPLING, POWER = 16, 3
#: Above this size a plain SVD is taken from the Gram matrix.
_SQUARE_BEYOND = 512


def sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (out, in·kernel)."""
    return shape[0], math.prod(shape[1:])


def full_rank(shape: tuple[int, ...]) -> int:
    return min(sides(shape))


def clip(shape: tuple[int, ...], n: int) -> int:
    return min(n, full_rank(shape))


def n_params(shape: tuple[int, ...], rank: Rank) -> int:
    assert isinstance(rank, int)
    return rank * sum(sides(shape))


def factor_shapes(shape: tuple[int, ...], rank: Rank) -> dict[str, tuple[int, ...]]:
    assert isinstance(rank, int)
    return {"U": (shape[0], rank), "V": (rank, *shape[1:])}


def n_macs(shape: tuple[int, ...], rank: Rank, positions: int) -> int:
    return n_params(shape, rank) * positions


def decompose(
    weight: Tensor, rank: Rank, statistics: Statistics | None = None, *, algorithm: str = "auto"
) -> Factorization:
    """Return the best rank-`rank` factors of `weight` (out, in) or (out, in, *k) in the metric of `statistics`.

    Factors: `U` (out, r) and `V` (r, in, *k). `algorithm`: "full", "randomized", or "auto" for the cheaper. Raises `ValueError` for a rank outside 1…full.
    """
    if not isinstance(rank, int) or not 1 <= rank <= full_rank(tuple(weight.shape)):
        raise ValueError(f"expected a rank in 1…{full_rank(tuple(weight.shape))}, got {rank}")
    if statistics is not None:
        statistics.check(weight)
    u, v, _ = _factors(unfolded(weight).double(), rank, statistics or Statistics(), algorithm)
    u, flipped = fix_signs(u, v)
    assert flipped is not None
    # Equal norms on both sides keep half precision and training well conditioned.
    balance = (
        (torch.linalg.matrix_norm(flipped) / torch.linalg.matrix_norm(u).clamp_min(1e-300)).clamp_min(1e-300).sqrt()
    )
    if float(balance) > 1e-100:
        u, flipped = u * balance, flipped / balance
    factors = {"U": u, "V": flipped.reshape(rank, *weight.shape[1:])}
    return Factorization.of(_NAME, factors, weight, rank, statistics)


def curve(weight: Tensor, statistics: Statistics | None = None) -> list[Point]:
    """Return every rank with its loss, from one eigendecomposition."""
    shape = tuple(weight.shape)
    values = spectrum(weight, statistics)
    tails = values.sum() - values.cumsum(0)
    return [Point(r, n_params(shape, r), max(float(tails[r - 1]), 0.0)) for r in range(1, full_rank(shape) + 1)]


def spectrum(weight: Tensor, statistics: Statistics | None = None) -> Tensor:
    """Return the squared singular values of `weight` in the metric of `statistics`, descending: what each rank explains."""
    return _SPECTRUM(weight, statistics)


_SPECTRUM = Memo(lambda weight, metric: _factors(unfolded(weight).double(), 0, metric)[2])


def _factors(w: Tensor, rank: int, statistics: Statistics, algorithm: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Return U, V and the squared singular values of W in the metric, descending."""
    if statistics.row_weights is not None:
        return _weighted_rows(w, rank, statistics)
    s, g = statistics.s, statistics.g
    m, n = w.shape
    left = None if g is None else torch.linalg.cholesky(g)
    lw = w if left is None else left.T @ w
    if rank and (prefers_randomized((m, n), rank) if algorithm == "auto" else algorithm == "randomized"):
        values, p = randomized_eigenvectors(lambda x: lw @ (lw.T @ x if s is None else s @ (lw.T @ x)), m, rank)
        u = p if left is None else torch.linalg.solve_triangular(left.T, p, upper=True)
        return u, p.T @ lw, values
    if s is None and g is None and min(m, n) > _SQUARE_BEYOND:
        # Eigenvectors of W Wᵀ in float64: exact to 1e-8 of the largest singular value, at a tenth of the time.
        flip = m > n
        values, p = top_eigenvectors(lw.T @ lw if flip else lw @ lw.T, rank)
        if flip:
            return lw @ p, p.T, values
        return p, p.T @ lw, values
    if s is None and g is None:
        p, d, qt = torch.linalg.svd(w, full_matrices=False)
        return p[:, :rank] * d[:rank], qt[:rank], d.square()
    if m <= n or s is None:
        values, p = top_eigenvectors(lw @ (lw.T if s is None else s @ lw.T), rank)
    else:
        # The smaller side: eigenvectors of L_Sᵀ(LᵀW)ᵀ(LᵀW)L_S give the same left space, still without an inverse.
        eigenvalues, q = torch.linalg.eigh(s)
        ls = q * eigenvalues.clamp_min(0).sqrt()
        b = lw @ ls
        values, right = top_eigenvectors(b.T @ b, rank)
        p, _ = torch.linalg.qr(b @ right) if rank else (b[:, :0], None)
    u = p if left is None else torch.linalg.solve_triangular(left.T, p, upper=True)
    return u, p.T @ lw, values


def pca(weight: Tensor, rank: int, statistics: Statistics) -> Factorization:
    """Return the principal components of the layer's outputs: this form without an output metric, U orthonormal.

    With centred moments, V (x − μ) are the scores of the outputs W (x − μ) on the columns of U.
    """
    if statistics.gram is None:
        raise ValueError("expected input moments: principal components are those of data")
    one_sided = replace(statistics, output_gram=None)
    one_sided.check(weight)
    u, v, _ = _factors(unfolded(weight).double(), rank, one_sided)
    return Factorization.of(_NAME, {"U": u, "V": v.reshape(rank, *weight.shape[1:])}, weight, rank, one_sided)


def prefers_randomized(shape: tuple[int, ...], rank: int) -> bool:
    """Return whether a subspace iteration costs less than a tenth of the eigenproblem, counted in multiply-adds."""
    rows, columns = sides(shape)
    small, width = min(rows, columns), rank + OVERSAMPLING
    # An eigendecomposition takes about 9 n³; one application of K to a block 2 m n per column.
    return small >= 1024 and (POWER + 2) * 2 * rows * columns * width + 4 * small * width**2 < 0.9 * small**3


def randomized_eigenvectors(
    k: Callable[[Tensor], Tensor], n: int, rank: int, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the leading eigenvalues and eigenvectors (n, rank) of a PSD operator; equal seeds give equal bytes.

    Source: Halko, Martinsson & Tropp 2011, algorithm 4.4 with `POWER` steps and `OVERSAMPLING` further directions.
    """
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(n, min(n, rank + OVERSAMPLING), generator=generator, dtype=torch.float64)
    for _ in range(POWER + 1):
        q, _ = torch.linalg.qr(k(q))
    values, inner = top_eigenvectors(q.T @ k(q), rank)
    leading, _ = fix_signs(q @ inner)
    return values[:rank], leading


def _weighted_rows(w: Tensor, rank: int, statistics: Statistics) -> tuple[Tensor, Tensor, Tensor]:
    """Minimise Σ_v p_v‖E_v − Ê_v‖²_G: project every row, seen or not, on the leading directions of Lᵀ Eᵀ diag(p) E L."""
    assert statistics.row_weights is not None
    weights = statistics.row_weights.double()
    if not float(weights.sum()) > 0:
        weights = torch.ones_like(weights)
    left = None if statistics.g is None else torch.linalg.cholesky(statistics.g)
    el = w if left is None else w @ left
    values, p = top_eigenvectors(el.T @ (weights[:, None] * el), rank)
    v = p.T if left is None else torch.linalg.solve_triangular(left, p.T, upper=False, left=False)
    return el @ p, v, values


def to_tensor(factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    return (factors["U"] @ unfolded(factors["V"])).reshape(shape)


def linear(factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(F.linear(x, factors["V"]), factors["U"])


def conv(factors: Mapping[str, Tensor], x: Tensor, geometry: ConvGeometry) -> Tensor:
    return pointwise(convolve(x, factors["V"], geometry), factors["U"])


def embedding(factors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    return F.embedding(ids, factors["U"]) @ factors["V"]
