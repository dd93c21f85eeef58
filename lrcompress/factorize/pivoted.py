"""Rank r without its redundancy: r rows of Ŵ as they are, the others as combinations of them.

With pivot rows p and the rest q, Ŵ_q = T Ŵ_p; stored are Ŵ_p (r, n), T (m − r, r) and the order of the rows, that is
r(m + n) − r² numbers: the dimension of the set of rank-r matrices, and below dense for every r < min(m, n). The matrix
itself is that of the SVD form, in the same metric. Embeddings are left to that form: r² is little beside their rows.

Source: PIFA (ICML 2025) for the gauge; `_gauge` for the pivots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from . import svd
from ._gauge import pivot_rows, unpivoted
from ._linalg import convolve, pointwise, unfolded
from ._types import ConvGeometry, Factorization, Point, Rank, Statistics

LAYERS = frozenset({"linear", "conv"})
#: Factors that are positions, not numbers.
INTEGER = frozenset({"order"})
#: What it is in its plain gauge.
PLAIN = "svd"
_NAME = __name__.rpartition(".")[2]

full_rank, clip = svd.full_rank, svd.clip


def n_params(shape: tuple[int, ...], rank: Rank) -> int:
    assert isinstance(rank, int)
    return svd.n_params(shape, rank) - rank * rank


def factor_shapes(shape: tuple[int, ...], rank: Rank) -> dict[str, tuple[int, ...]]:
    assert isinstance(rank, int)
    return {"P": (rank, *shape[1:]), "T": (shape[0] - rank, rank), "order": (shape[0],)}


def n_macs(shape: tuple[int, ...], rank: Rank, positions: int) -> int:
    """Return what a runtime multiplies, with whole bases or densely, whichever is less (`is_dense_when_loaded`)."""
    return min(svd.n_macs(shape, rank, positions), math.prod(shape) * positions)


def is_dense_when_loaded(shape: tuple[int, ...], rank: Rank) -> bool:
    """Tell whether the dense product is less than that of whole bases: then it is what a runtime makes of the factors."""
    return svd.n_macs(shape, rank, 1) >= math.prod(shape)


def decompose(weight: Tensor, rank: Rank, statistics: Statistics | None = None) -> Factorization:
    """Return `P`, the kept rows (r, in, *k), `T` (out − r, r), and `order` (out,): where in [P x; T P x] each output lies."""
    best = svd.decompose(weight.double(), rank, statistics)
    u, v = best.factors["U"], unfolded(best.factors["V"])
    assert isinstance(rank, int)
    kept, others, order = pivot_rows(u)
    factors = {"P": (u[kept] @ v).reshape(rank, *weight.shape[1:]), "T": others, "order": order}
    return Factorization.of(_NAME, factors, weight, rank, statistics)


def curve(weight: Tensor, statistics: Statistics | None = None) -> list[Point]:
    """Return every rank with its loss: that of the SVD, for fewer numbers."""
    shape = tuple(weight.shape)
    return [Point(p.rank, n_params(shape, p.rank), p.loss) for p in svd.curve(weight, statistics)]


def linear_as_loaded(factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """As `linear`, with [1; T] as one matrix that a runtime makes when it loads the graph: no output is moved."""
    basis = unpivoted(factors["T"], factors["order"])
    if is_dense_when_loaded(_shape(factors), len(factors["P"])):
        return F.linear(x, basis @ factors["P"])
    return F.linear(F.linear(x, factors["P"]), basis)


def conv_as_loaded(factors: Mapping[str, Tensor], x: Tensor, geometry: ConvGeometry) -> Tensor:
    shape, basis = _shape(factors), unpivoted(factors["T"], factors["order"])
    if is_dense_when_loaded(shape, len(factors["P"])):
        return convolve(x, (basis @ unfolded(factors["P"])).reshape(shape), geometry)
    return pointwise(convolve(x, factors["P"], geometry), basis)


def _shape(factors: Mapping[str, Tensor]) -> tuple[int, ...]:
    return (len(factors["order"]), *factors["P"].shape[1:])


def to_tensor(factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    rows = unfolded(factors["P"])
    return torch.cat([rows, factors["T"] @ rows]).index_select(0, factors["order"]).reshape(shape)


def linear(factors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    kept = F.linear(x, factors["P"])
    return torch.cat([kept, F.linear(kept, factors["T"])], -1).index_select(-1, factors["order"])


def conv(factors: Mapping[str, Tensor], x: Tensor, geometry: ConvGeometry) -> Tensor:
    kept, others = convolve(x, factors["P"], geometry), factors["T"]
    both = torch.cat([kept, pointwise(kept, others)], 1) if len(others) else kept
    return both.index_select(1, factors["order"])
