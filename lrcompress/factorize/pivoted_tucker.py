"""Tucker-2 without its redundancy: both bases in the pivot gauge.

Of the channels x, R_in are taken as they are and the rest mixed into them; of the outputs, R_out leave the core as
they are and the rest are combinations of them:

    z = x_p + S x_q,   c = core * z,   y = [c; T c] in the order of the outputs

The kernel is that of the Tucker form at the same ranks, in the same metric, for R_out² + R_in² fewer numbers, which is
the dimension of that set; at full ranks it is the dense kernel. A side of full rank needs no mixing at all.

Source: Kim et al., arXiv 1511.06530 (the layer chain); `_gauge` for the pivots, on O and on Iᵀ.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import tucker
from ._gauge import pivot_rows
from ._linalg import convolve, pointwise
from ._types import ConvGeometry, Factorization, Point, Rank, Statistics

LAYERS = frozenset({"conv"})
#: Factors that are positions, not numbers.
INTEGER = frozenset({"inputs", "order"})
#: What it is in its plain gauge.
PLAIN = "tucker"
_NAME = __name__.rpartition(".")[2]

serves, full_rank, clip = tucker.serves, tucker.full_rank, tucker.clip


def n_params(shape: tuple[int, ...], rank: Rank) -> int:
    plain = tucker.n_params(shape, rank)
    assert not isinstance(rank, int)
    return plain - rank[0] ** 2 - rank[1] ** 2


def factor_shapes(shape: tuple[int, ...], rank: Rank) -> dict[str, tuple[int, ...]]:
    assert not isinstance(rank, int)
    found: dict[str, tuple[int, ...]] = {"core": (*rank, *shape[2:])}
    if rank[1] < shape[1]:
        found |= {"S": (rank[1], shape[1] - rank[1]), "inputs": (shape[1],)}
    return found if rank[0] == shape[0] else {**found, "T": (shape[0] - rank[0], rank[0]), "order": (shape[0],)}


def n_macs(shape: tuple[int, ...], rank: Rank, positions: int) -> int:
    return n_params(shape, rank) * positions


def decompose(weight: Tensor, rank: Rank, statistics: Statistics | None = None) -> Factorization:
    """Return `core` (R_out, R_in, *k) of `weight` (out, in, *k) and, per side that is not of full rank, what mixes it.

    `S` (R_in, in − R_in) and `inputs` (in,), the channels in the order [p; q]; `T` (out − R_out, R_out) and `order`
    (out,), where in [c; T c] each output lies.
    """
    best = tucker.decompose(weight.double(), rank, statistics)
    out, core, inner = (best.factors[k] for k in ("O", "core", "I"))
    factors: dict[str, Tensor] = {}
    if inner.shape[0] < inner.shape[1]:
        kept, mixed, place = pivot_rows(inner.T)
        factors |= {"S": mixed.T, "inputs": place.argsort().to(torch.int32)}
        inner = inner[:, kept]
    if out.shape[1] < out.shape[0]:
        kept, mixed, place = pivot_rows(out)
        factors |= {"T": mixed, "order": place}
        out = out[kept]
    core = torch.einsum("oa,ab...,bi->oi...", out, core, inner)
    return Factorization.of(_NAME, {"core": core, **factors}, weight, rank, statistics)


def curve(weight: Tensor, statistics: Statistics | None = None) -> list[Point]:
    """Return the ranks of the Tucker form with their losses, for fewer numbers."""
    shape = tuple(weight.shape)
    return [Point(p.rank, n_params(shape, p.rank), p.loss) for p in tucker.curve(weight, statistics)]


def to_tensor(factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    w = factors["core"]
    if "S" in factors:
        mixed = torch.einsum("ab...,bi->ai...", w, factors["S"])
        w = torch.cat([w, mixed], 1).index_select(1, factors["inputs"].argsort())
    if "T" in factors:
        w = torch.cat([w, torch.einsum("qa,ai...->qi...", factors["T"], w)]).index_select(0, factors["order"])
    return w.reshape(shape)


def conv(factors: Mapping[str, Tensor], x: Tensor, geometry: ConvGeometry) -> Tensor:
    core = factors["core"]
    if "S" in factors:
        inner = core.shape[1]
        ordered = x.index_select(1, factors["inputs"])
        x = ordered[:, :inner] + pointwise(ordered[:, inner:], factors["S"])
    kept = convolve(x, core, geometry)
    if "T" not in factors:
        return kept
    return torch.cat([kept, pointwise(kept, factors["T"])], 1).index_select(1, factors["order"])
