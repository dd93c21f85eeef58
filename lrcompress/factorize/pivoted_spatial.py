"""Spatial SVD without its redundancy: one tap of the second filters costs little or nothing.

The pair A (r, in, k₁), B (out, r, k₂) and the pair (M A, B M⁻¹) are the same kernel. For one tap c of B with the slice
B_c (out, r), M is chosen so that B_c M⁻¹ becomes trivial:

    r < out:   M = B_c[p], pivot rows p:   B_c M⁻¹ = [1; T] in some order,  r(in·k₁ + out·k₂) − r² numbers
    r ≥ out:   M = [B_c; N], N ⟂ B_c:      B_c M⁻¹ = [1 0],                 r·in·k₁ + out·r(k₂ − 1) numbers

The other taps stay one convolution: those around the middle one of three have twice the dilation, those before the
last or after the first are contiguous. The kernel is that of the spatial SVD at the same rank, in the same metric.
Where no tap allows it without large terms that cancel, which float32 would feel, the form is refused.

Source: Jaderberg et al., arXiv 1405.3866 (the layer pair); `_gauge` for the pivots. r(in·k₁ + out·k₂) − r² is the
dimension of the set (`inspect --theory spatial_svd`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import spatial_svd
from ._gauge import pivot_rows
from ._linalg import convolve, pointwise
from ._types import ConvGeometry, Factorization, Point, Rank, Refused, Statistics

LAYERS = frozenset({"conv"})
#: Factors that are positions, not numbers.
INTEGER = frozenset({"order"})
#: What it is in its plain gauge, which holds the weights that this one refuses.
PLAIN = "spatial_svd"
_NAME = __name__.rpartition(".")[2]
#: How much larger than the kernel's largest entry the terms that add up to an entry may be.
_GROWTH = 1e3
#: The middle tap needs no padding of its own: it is taken unless another one's growth is so many times less.
_PREFERENCE = 10.0

serves, full_rank, clip = spatial_svd.serves, spatial_svd.full_rank, spatial_svd.clip


def n_params(shape: tuple[int, ...], rank: Rank) -> int:
    assert isinstance(rank, int)
    return spatial_svd.n_params(shape, rank) - rank * min(rank, shape[0])


def factor_shapes(shape: tuple[int, ...], rank: Rank) -> dict[str, tuple[int, ...]]:
    """Return the shapes with the vertical filters first and the taps that usually stay; both depend on the weight."""
    assert isinstance(rank, int)
    plain = spatial_svd.factor_shapes(shape, rank)
    taps = plain["second"][-1]
    found = {"first": plain["first"]}
    if taps > 1:
        found["around" if taps == 3 else "after"] = (*plain["second"][:-1], taps - 1)
    return found if rank >= shape[0] else {**found, "T": (shape[0] - rank, rank), "order": (shape[0],)}


def n_macs(shape: tuple[int, ...], rank: Rank, positions: int) -> int:
    """Return what a runtime multiplies, with all taps or densely, whichever is less (`is_dense_when_loaded`)."""
    return min(spatial_svd.n_macs(shape, rank, positions), math.prod(shape) * positions)


def is_dense_when_loaded(shape: tuple[int, ...], rank: Rank) -> bool:
    """Tell whether the dense product is less than that of both filters: then it is what a runtime makes of the factors."""
    return spatial_svd.n_macs(shape, rank, 1) >= math.prod(shape)


def decompose(weight: Tensor, rank: Rank, statistics: Statistics | None = None) -> Factorization:
    """Return `first` (r, in, k₁), the other taps of the second filters and, for r < out, `T` (out − r, r) and `order` (out,).

    The taps (out, r, k₂ − 1), rows in the order [p; q], are called by where they lie: `around` tap 1 of 3, `before` the
    last or `after` the first; there are none for k₂ = 1. Filters have the kernel's axes, of length 1 where they are
    flat. Raises `Refused` where the change of gauge would cost accuracy.
    """
    shape = tuple(weight.shape)
    plain = spatial_svd.decompose(weight.double(), rank, statistics)
    factors, growth = _gauged(**plain.factors)
    if growth > _GROWTH:
        raise Refused(
            f"terms of at most {_GROWTH:.0e} times the kernel {shape} at rank {rank}",
            f"{growth:.0e} times",
            "use spatial_svd, or another rank",
        )
    return Factorization.of(_NAME, factors, weight, rank, statistics)


def _gauged(first: Tensor, second: Tensor) -> tuple[dict[str, Tensor], float]:
    """Return the factors of the best tap and their growth: the largest sum of absolute terms over the largest entry."""
    out, rank, *kernel = second.shape
    a, b = first.reshape(rank, -1), second.reshape(out, rank, -1).permute(2, 0, 1)
    taps = len(b)
    best: tuple[float, float, dict[str, Tensor]] | None = None
    for c, name in _choices(taps):
        mixed, changed, pivots = _change(a, b, c)
        growth = _growth(b @ a, mixed, changed)
        score = growth / (_PREFERENCE if name == "around" else 1.0)
        if best is not None and best[0] <= score:
            continue
        others = torch.cat([changed[:c], changed[c + 1 :]]).permute(1, 2, 0)
        if "order" in pivots:
            others = others[pivots["order"].argsort()]
        stored = {name: others.reshape(out, rank, *(taps - 1 if n == taps else 1 for n in kernel))} if taps > 1 else {}
        best = score, growth, {"first": mixed.reshape(first.shape), **stored, **pivots}
        if growth < _PREFERENCE:
            break
    assert best is not None
    return best[2], best[1]


def _choices(taps: int) -> list[tuple[int, str]]:
    """Return the taps that leave one regular convolution, and what the others are called."""
    ends = [(0, "after"), (taps - 1, "before")] if taps > 1 else [(0, "after")]
    return [(1, "around"), *ends] if taps == 3 else ends


def _change(a: Tensor, b: Tensor, c: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return M A, all taps of B M⁻¹, and T with the order of its rows where there are any.

    A (r, n), B (k₂, out, r). Directions that B_c does not reach get no inverse; whether they mattered, `_growth` says.
    """
    _, out, rank = b.shape
    if rank >= out:
        u, d, vt = torch.linalg.svd(b[c])
        scale = float(d.square().mean().sqrt()) or 1.0
        free = vt[out:]
        inverse = torch.cat([vt[:out].T @ (_reciprocal(d)[:, None] * u.T), free.T / scale], 1)
        mixed, head, pivots = torch.cat([b[c] @ a, scale * (free @ a)]), torch.eye(out, rank, dtype=a.dtype), {}
    else:
        kept, t, order = pivot_rows(b[c])
        u, d, vt = torch.linalg.svd(b[c][kept])
        inverse = vt.T @ (_reciprocal(d)[:, None] * u.T)
        mixed, pivots = b[c][kept] @ a, {"T": t, "order": order}
        head = torch.cat([torch.eye(rank, dtype=a.dtype), t])[order]
    changed = b @ inverse
    changed[c] = head
    return mixed, changed, pivots


def _reciprocal(d: Tensor) -> Tensor:
    keep = d > 1e-12 * d.max()
    return torch.where(keep, 1 / torch.where(keep, d, 1.0), 0.0)


def _growth(kernel: Tensor, mixed: Tensor, changed: Tensor) -> float:
    """Return max Σ|terms| / max|kernel|; infinite where the kernel is not the same."""
    largest = float(kernel.abs().max())
    if float((changed @ mixed - kernel).abs().max()) > 1e-8 * largest:
        return math.inf
    return float((changed.abs() @ mixed.abs()).max()) / largest if largest > 0 else 1.0


def curve(weight: Tensor, statistics: Statistics | None = None) -> list[Point]:
    """Return the ranks of the spatial SVD with their losses, for fewer numbers, where the change of gauge is harmless."""
    shape = tuple(weight.shape)
    return [
        Point(len(fit.a), n_params(shape, len(fit.a)), fit.loss)
        for fit in spatial_svd.offered(weight, statistics)
        if _gauged(**spatial_svd.filters(fit, shape))[1] <= _GROWTH
    ]


def to_tensor(factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    return _product(factors["first"], _second(factors, shape[0]), shape)


def conv_as_loaded(factors: Mapping[str, Tensor], x: Tensor, geometry: ConvGeometry) -> Tensor:
    """As `conv`, with all taps in one kernel that a runtime makes when it loads the graph: no channel is moved."""
    first, second = factors["first"], _second(factors, None)
    kernel = (max(a, b) for a, b in zip(first.shape[2:], second.shape[2:], strict=True))
    shape = (len(second), first.shape[1], *kernel)
    if is_dense_when_loaded(shape, len(first)):
        return convolve(x, _product(first, second, shape), geometry)
    z = before(factors, x, geometry)
    return (
        convolve(z, second, spatial_svd.only(geometry, 1 - _axis(first)))
        if first.dim() == 4
        else pointwise(z, second[..., 0])
    )


def _product(first: Tensor, second: Tensor, shape: tuple[int, ...]) -> Tensor:
    if first.dim() == 3:
        return torch.einsum("rik,orw->oik", first, second).reshape(shape)
    return torch.einsum("rihw,oruv->oihuwv" if _axis(first) == 0 else "rihw,oruv->oiuhvw", first, second).reshape(shape)


def _second(factors: Mapping[str, Tensor], out: int | None) -> Tensor:
    """Return the second filters, all taps of them, with the kernel's axes; `out`: how many, where no factor says it."""
    first, (c, others) = factors["first"], _others(factors)
    rank = first.shape[0]
    if others is not None and "T" not in factors:
        out = len(others)
    flat = (1,) * (first.dim() - 2)
    own = min(rank, rank if "T" in factors or out is None else out)
    taps = torch.eye(own, rank, dtype=first.dtype, device=first.device).reshape(own, rank, *flat)
    if "T" in factors:
        taps = torch.cat([taps, factors["T"].reshape(-1, rank, *flat)])
    if others is not None:
        along = 2 + (1 - _axis(first) if first.dim() == 4 else 0)
        left, right = others.split([c, others.shape[along] - c], along)  # type: ignore[no-untyped-call]
        taps = torch.cat([t for t in (left, taps, right) if t.shape[along]], along)
    return taps.index_select(0, factors["order"]) if "order" in factors else taps


def _others(factors: Mapping[str, Tensor]) -> tuple[int, Tensor | None]:
    """Return the place of the tap that is not stored, and the taps that are."""
    for name in ("around", "before", "after"):
        if name in factors:
            taps = factors[name]
            return {"around": 1, "before": max(taps.shape[2:]), "after": 0}[name], taps
    return 0, None


def _axis(first: Tensor) -> int:
    """Return the spatial axis that the first filters walk along."""
    return 1 if first.dim() == 4 and first.shape[3] > 1 else 0


def conv(factors: Mapping[str, Tensor], x: Tensor, geometry: ConvGeometry) -> Tensor:
    """First filters, then the second ones on what they give."""
    return after(factors, before(factors, x, geometry), geometry)


def before(factors: Mapping[str, Tensor], x: Tensor, geometry: ConvGeometry) -> Tensor:
    """Return what the first filters give."""
    first = factors["first"]
    return convolve(x, first, spatial_svd.only(geometry, _axis(first)) if first.dim() == 4 else geometry)


def after(factors: Mapping[str, Tensor], z: Tensor, geometry: ConvGeometry) -> Tensor:
    """Take the trivial tap as slices of z, the other taps as a convolution beside it."""
    first = factors["first"]
    along, (c, others) = 1 - _axis(first), _others(factors)
    if others is None:
        kept = _strided(z, along, geometry, 0, 0) if first.dim() == 4 else z
    else:
        kept = _strided(z, along, geometry, c, max(others.shape[2:]) - c)
    if "T" in factors:
        kept = torch.cat([kept, pointwise(kept, factors["T"])], 1)
    else:
        kept = kept[:, : len(others) if others is not None else first.shape[0]]
    if others is not None:
        kept = kept + _beside(z, others, along, geometry, c)
    return kept.index_select(1, factors["order"]) if "order" in factors else kept


def _strided(z: Tensor, axis: int, geometry: ConvGeometry, before: int, after: int) -> Tensor:
    """Return what one tap sees that has so many taps before and after it: the input, padded or cut, every stride-th."""
    d, p, s = (getattr(geometry, k)[axis] for k in ("dilation", "padding", "stride"))
    window = _window(z, axis, before * d - p, after * d - p)
    return window if s == 1 else window[(slice(None),) * (2 + axis) + (slice(None, None, s),)]


def _beside(z: Tensor, taps: Tensor, axis: int, geometry: ConvGeometry, c: int) -> Tensor:
    """Convolve with the taps beside the trivial one, number c."""
    along = spatial_svd.only(geometry, axis)
    n, d, p = max(taps.shape[2:]), along.dilation[axis], along.padding[axis]
    if c not in (0, n):
        spread = tuple(2 * v if i == axis else v for i, v in enumerate(along.dilation))
        return convolve(z, taps, replace(along, dilation=spread))
    cut = _window(z, axis, d - p if c == 0 else -p, d - p if c == n else -p)
    return convolve(cut, taps, replace(along, padding=(0, 0)))


def _window(z: Tensor, axis: int, low: int, high: int) -> Tensor:
    """Cut so many entries at either end of a spatial axis; where negative, add zeros."""
    if low > 0 or high > 0:
        end = -high if high > 0 else None
        z = z[(slice(None),) * (2 + axis) + (slice(max(low, 0), end),)]
    if low < 0 or high < 0:
        pad = max(-low, 0), max(-high, 0)
        z = F.pad(z, pad if axis == 1 else (0, 0, *pad))
    return z
