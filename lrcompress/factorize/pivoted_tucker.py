"""Tucker-2 without its redundancy: both bases in the pivot gauge.

Of the channels x, R_in are taken as they are and the rest mixed into them; of the outputs, R_out leave the core as
they are and the rest are combinations of them:

    z = x_p + S x_q,   c = core * z,   y = [c; T c] in the order of the outputs

The kernel is that of the Tucker form at the same ranks, in the same metric, for R_out² + R_in² fewer numbers, which is
the dimension of that set; at full ranks it is the dense kernel. A side of full rank needs no mixing at all.

Source: Kim et al., arXiv 1511.06530 (the layer chain); `_gauge` for the pivots, on O and on Iᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from . import tucker
from ._gauge import pivot_rows, unpivoted
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
    """Return what a runtime multiplies, with whole bases or densely, whichever is less (`is_dense_when_loaded`)."""
    return min(_whole_macs(shape, rank), math.prod(shape)) * positions


def is_dense_when_loaded(shape: tuple[int, ...], rank: Rank) -> bool:
    """Tell whether the dense product is less than that of whole bases: then it is what a runtime makes of the factors."""
    return _whole_macs(shape, rank) >= math.prod(shape)


def _whole_macs(shape: tuple[int, ...], rank: Rank) -> int:
    """Return the multiply-adds of one position with whole bases; a side of full rank has none."""
    assert not isinstance(rank, int)
    out, inner = rank
    mixed = (shape[0] * out if out < shape[0] else 0) + (shape[1] * inner if inner < shape[1] else 0)
    return mixed + out * inner * math.prod(shape[2:])


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


def conv_as_loaded(factors: Mapping[str, Tensor], x: Tensor, geometry: ConvGeometry) -> Tensor:
    """As `conv`, with both bases as matrices that a runtime makes when it loads the graph: no channel is moved."""
    core = factors["core"]
    outside = unpivoted(factors["T"], factors["order"]) if "T" in factors else None
    inside = unpivoted(factors["S"].T, factors["inputs"].argsort()).T if "S" in factors else None
    shape = (
        core.shape[0] if outside is None else len(outside), core.shape[1] if inside is None else inside.shape[1], *core.shape[2:]
    )  # fmt: skip
    if is_dense_when_loaded(shape, (core.shape[0], core.shape[1])):
        whole = core.flatten(2) if inside is None else torch.einsum("orw,ri->oiw", core.flatten(2), inside)
        whole = whole if outside is None else torch.einsum("po,oiw->piw", outside, whole)
        return convolve(x, whole.reshape(shape), geometry)
    y = convolve(x if inside is None else pointwise(x, inside), core, geometry)
    return y if outside is None else pointwise(y, outside)
