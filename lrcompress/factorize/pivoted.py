"""Rank r without its redundancy: r rows of Ŵ as they are, the others as combinations of them.

With pivot rows p and the rest q, Ŵ_q = T Ŵ_p; stored are Ŵ_p (r, n), T (m − r, r) and the order of the rows, that is
r(m + n) − r² numbers: the dimension of the set of rank-r matrices, and below dense for every r < min(m, n). The matrix
itself is that of the SVD form, in the same metric. Embeddings are left to that form: r² is little beside their rows.

Source: PIFA (ICML 2025) for the gauge; pivots by column-pivoted QR of Uᵀ, then exchanges until no entry of T exceeds
2 (Gu & Eisenstat 1996), so that neither half precision nor quantization meets a large T.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor

from . import svd
from ._linalg import convolve, pointwise, unfolded
from ._types import ConvGeometry, Factorization, Point, Rank, Statistics

LAYERS = frozenset({"linear", "conv"})
#: Factors that are positions, not numbers.
INTEGER = frozenset({"order"})
_NAME = __name__.rpartition(".")[2]
_MAX_ENTRY = 2.0

full_rank, clip = svd.full_rank, svd.clip


def n_params(shape: tuple[int, ...], rank: Rank) -> int:
    assert isinstance(rank, int)
    return svd.n_params(shape, rank) - rank * rank


def n_macs(shape: tuple[int, ...], rank: Rank, positions: int) -> int:
    return n_params(shape, rank) * positions


def decompose(weight: Tensor, rank: Rank, statistics: Statistics | None = None) -> Factorization:
    """Return `P`, the kept rows (r, in, *k), `T` (out − r, r), and `order` (out,): where in [P x; T P x] each output lies."""
    best = svd.decompose(weight.double(), rank, statistics)
    u, v = best.factors["U"], unfolded(best.factors["V"])
    assert isinstance(rank, int)
    kept, others, order = _pivots(u, rank)
    factors = {"P": (kept @ v).reshape(rank, *weight.shape[1:]), "T": others, "order": order}
    return Factorization.of(_NAME, factors, weight, rank, statistics)


def _pivots(u: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U_p (r, r), T = U_q U_p⁻¹ and, for every row, its place in [p; q]."""
    q, _ = np.linalg.qr(u.numpy())
    _, _, pivot = scipy.linalg.qr(q.T, mode="economic", pivoting=True)
    chosen, rest = list(pivot[:rank]), sorted(pivot[rank:])
    chosen.sort()
    for _ in range(4 * len(pivot)):
        t = np.linalg.solve(q[chosen].T, q[rest].T).T if rest else np.zeros((0, rank))
        if not t.size or np.abs(t).max() <= _MAX_ENTRY:
            break
        i, j = np.unravel_index(np.abs(t).argmax(), t.shape)
        rest[i], chosen[j] = chosen[j], rest[i]  # |det U_p| grows by that entry: this ends
    place = np.empty(len(pivot), np.int32)
    place[[*chosen, *rest]] = np.arange(len(pivot), dtype=np.int32)
    return u[torch.tensor(chosen)], torch.from_numpy(np.ascontiguousarray(t)), torch.from_numpy(place)


def curve(weight: Tensor, statistics: Statistics | None = None) -> list[Point]:
    """Return every rank with its loss: that of the SVD, for fewer numbers."""
    shape = tuple(weight.shape)
    return [Point(p.rank, n_params(shape, p.rank), p.loss) for p in svd.curve(weight, statistics)]


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
