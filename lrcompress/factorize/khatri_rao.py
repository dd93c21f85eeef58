"""Khatri-Rao product by columns, W ≈ Σ_k A_k ⊙ B_k: generically of full rank from K·n(I + J) numbers, m = I·J.

Column j, reshaped to I×J, has its best K terms in its own SVD: a closed form per column, no iteration. It saves bytes,
not time: the weight is rebuilt once, when the layer is loaded. With moments, both factors are then refitted in turn.

Source: Khatri & Rao 1968; per column it is Eckart & Young 1936.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ._linalg import convolve, unfolded
from ._refit import sweep
from ._types import ConvGeometry, Factorization, Point, Rank, Statistics
from .kronecker import split

LAYERS = frozenset({"linear", "conv", "embedding"})
_NAME = __name__.rpartition(".")[2]
#: Saves bytes only: never a default.
AUTO = False
DENSE_AT_RUN_TIME = True


def full_rank(shape: tuple[int, ...]) -> int:
    return min(split(shape[0]))


def clip(shape: tuple[int, ...], n: int) -> int:
    return min(n, full_rank(shape))


def n_params(shape: tuple[int, ...], rank: Rank) -> int:
    assert isinstance(rank, int)
    return rank * math.prod(shape[1:]) * sum(split(shape[0]))


def n_macs(shape: tuple[int, ...], rank: Rank, positions: int) -> int:
    return math.prod(shape) * positions


def decompose(weight: Tensor, rank: Rank, statistics: Statistics | None = None) -> Factorization:
    """Return `A` (K, I, in, *k) and `B` (K, J, in, *k) with I·J = out."""
    shape = tuple(weight.shape)
    if not isinstance(rank, int) or not 1 <= rank <= full_rank(shape):
        raise ValueError(f"expected 1…{full_rank(shape)} terms, got {rank}")
    if statistics is not None:
        statistics.check(weight)
    w = weight.double()
    p, d, qt = _spectra(w)
    roots = d[:, :rank].sqrt()
    a = (p[:, :, :rank] * roots[:, None, :]).permute(2, 1, 0)
    b = (qt[:, :rank] * roots[:, :, None]).permute(1, 2, 0)
    sign = torch.sign(a.gather(1, a.abs().argmax(1, keepdim=True)))
    sign = torch.where(sign == 0, 1.0, sign)
    factors = {n: (v * sign).reshape(*v.shape[:2], *shape[1:]) for n, v in (("A", a), ("B", b))}
    if statistics is not None and statistics.sides != (None, None):
        factors = sweep(lambda f: to_tensor(f, shape), factors, w, statistics, names=("A", "B"), sweeps=4)
    return Factorization.of(_NAME, factors, weight, rank, statistics)


def _spectra(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the SVDs of all columns, reshaped to I×J."""
    rows, columns = split(len(w))
    return torch.linalg.svd(unfolded(w).T.reshape(-1, rows, columns), full_matrices=False)  # type: ignore[no-any-return]


def curve(weight: Tensor, statistics: Statistics | None = None) -> list[Point]:
    """Return every number of terms with its loss (under statistics, the one that was reached)."""
    shape = tuple(weight.shape)
    ranks = range(1, full_rank(shape) + 1)
    if statistics is not None and statistics.sides != (None, None):
        return [Point(k, n_params(shape, k), decompose(weight.double(), k, statistics).loss) for k in ranks]
    _, d, _ = _spectra(weight.double())
    return [Point(k, n_params(shape, k), float(d[:, k:].square().sum())) for k in ranks]


def to_tensor(factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    a, b = (factors[n].reshape(*factors[n].shape[:2], -1) for n in ("A", "B"))
    return torch.einsum("kin,kjn->ijn", a, b).reshape(shape)


def _weight(factors: Mapping[str, Tensor]) -> Tensor:
    a, b = factors["A"], factors["B"]
    return to_tensor(factors, (a.shape[1] * b.shape[1], *a.shape[2:]))


def linear(factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(x, _weight(factors))


def conv(factors: Mapping[str, Tensor], x: Tensor, geometry: ConvGeometry) -> Tensor:
    return convolve(x, _weight(factors), geometry)


def embedding(factors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Row i·J + j is Σ_k A_k[i] ∘ B_k[j]: only the rows that are asked for are rebuilt."""
    a, b = factors["A"], factors["B"]
    rows_a = a.transpose(0, 1)[torch.div(ids, b.shape[1], rounding_mode="floor")]
    return (rows_a * b.transpose(0, 1)[torch.remainder(ids, b.shape[1])]).sum(-2)
