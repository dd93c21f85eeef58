"""CP of a convolution: 1×1 to R channels, one thin depthwise filter per axis, 1×1 back.

W ≈ Σ_r o_r ⊗ i_r ⊗ k¹_r ⊗ …. A best approximation of given R need not exist: two terms may grow against each other
without end, so every solve carries a ridge, and a solution whose terms outgrow the weight is done again with more.
With moments, the factors are then refitted in turn in their metric.

Source: Hitchcock 1927; Lebedev et al., arXiv 1412.6553 (the layer chain); de Silva & Lim 2008 (degeneracy). TensorLy's
ALS does the unweighted part.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence

import tensorly as tl
import torch
from tensorly.decomposition import parafac
from torch import Tensor

from ._curves import measured
from ._linalg import convolve, pointwise
from ._refit import sweep
from ._types import ConvGeometry, Factorization, Point, Rank, Statistics

LAYERS = frozenset({"conv"})
_NAME = __name__.rpartition(".")[2]
#: "auto" leaves it out: it needs training to be worth its place.
AUTO = False
_GRID = (0.125, 0.25, 0.5, 0.75, 1.0)
#: Largest share of the weight's own norm that the norms of all terms may add up to, before the ridge is raised.
_GROWTH = 50.0
_LETTERS = "cdefgh"


def serves(shape: tuple[int, ...]) -> bool:
    """A kernel of more than one tap: without one, CP is an SVD."""
    return len(shape) > 2 and math.prod(shape[2:]) > 1


def full_rank(shape: tuple[int, ...]) -> int:
    """The number of terms that always suffices: one for every entry of all modes but the longest."""
    return math.prod(shape) // max(shape)


def clip(shape: tuple[int, ...], n: int) -> int:
    return min(n, full_rank(shape))


def n_params(shape: tuple[int, ...], rank: Rank) -> int:
    assert isinstance(rank, int)
    return rank * sum(shape)


def n_macs(shape: tuple[int, ...], rank: Rank, positions: int) -> int:
    return n_params(shape, rank) * positions


def _names(axes: int) -> list[str]:
    return ["O", "I", *(f"K{i}" for i in range(axes))]


def decompose(weight: Tensor, rank: Rank, statistics: Statistics | None = None) -> Factorization:
    """Return `O` (out, R), `I` (in, R) and one `K0`, `K1`, … (k, R) per axis of `weight` (out, in, *k)."""
    shape = tuple(weight.shape)
    if weight.dim() < 3:
        raise ValueError(f"expected a convolution weight, got shape {shape}")
    if not isinstance(rank, int) or not 1 <= rank <= full_rank(shape):
        raise ValueError(f"expected 1…{full_rank(shape)} terms, got {rank}")
    if statistics is not None:
        statistics.check(weight)
    w = weight.double()
    if rank == full_rank(shape):
        modes = _exact(w)
    else:
        modes = _als(w, rank)
    factors = dict(zip(_names(len(shape) - 2), modes, strict=True))
    if statistics is not None and statistics.sides != (None, None) and rank < full_rank(shape):
        factors = sweep(lambda f: to_tensor(f, shape), factors, w, statistics, names=sorted(factors), sweeps=3)
        factors = dict(zip(factors, _balanced(list(factors.values())), strict=True))
    return Factorization.of(_NAME, factors, weight, rank, statistics)


def _als(w: Tensor, rank: int) -> list[Tensor]:
    """Return the better of TensorLy's ALS from two starts, with the ridge raised until no terms grow against each other."""
    scale = float(w.square().mean())
    if not scale > 0:
        return [torch.zeros(n, rank, dtype=w.dtype) for n in w.shape]
    found: list[tuple[float, list[Tensor]]] = []
    with tl.backend_context("pytorch", local_threadsafe=True), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # TensorLy tells that a rank exceeds a mode: it fills the start at random, seeded
        for ridge, start in itertools.product((1e-6, 1e-4, 1e-2, 1.0), ("svd", "random")):
            if start == "svd" and found:
                break
            # The scale is taken out: the ridge then means the same for every weight.
            _, modes = parafac(
                w / math.sqrt(scale), rank, n_iter_max=100, init=start, tol=1e-9, l2_reg=ridge, random_state=0
            )
            modes = _balanced([modes[0] * math.sqrt(scale), *modes[1:]])
            norms = torch.stack([m.norm(dim=0) for m in modes]).prod(0)
            if torch.isfinite(norms).all() and float(norms.norm()) <= _GROWTH * float(w.norm()):
                found.append((float((w - _product(modes)).square().sum()), modes))
    return min(found, key=lambda f: f[0])[1] if found else [torch.zeros(n, rank, dtype=w.dtype) for n in w.shape]


def _product(modes: Sequence[Tensor]) -> Tensor:
    letters = "oi" + _LETTERS[: len(modes) - 2]
    return torch.einsum(",".join(f"{c}r" for c in letters) + f"->{letters}", *modes)


def _exact(w: Tensor) -> list[Tensor]:
    """Return one term per entry of all modes but the longest: unit vectors there, a fibre of W in the longest."""
    longest = max(range(w.dim()), key=lambda i: w.shape[i])
    others = [n for i, n in enumerate(w.shape) if i != longest]
    index = torch.cartesian_prod(*(torch.arange(n) for n in others)).reshape(-1, len(others))
    units = iter(torch.eye(n, dtype=w.dtype)[:, index[:, i]] for i, n in enumerate(others))
    fibres = w.movedim(longest, 0).reshape(w.shape[longest], -1)
    return [fibres if i == longest else next(units) for i in range(w.dim())]


def _balanced(modes: list[Tensor]) -> list[Tensor]:
    """Spread each term's norm evenly over its vectors; the largest entry of every vector but the first is positive."""
    norms = torch.stack([m.norm(dim=0) for m in modes])
    total = norms.prod(0)
    share = total.clamp_min(1e-300) ** (1 / len(modes))
    out, sign = [], torch.ones_like(total)
    for m, n in zip(modes[1:], norms[1:], strict=True):
        flip = torch.sign(m.gather(0, m.abs().argmax(0, keepdim=True)).squeeze(0))
        flip = torch.where(flip == 0, 1.0, flip)
        sign = sign * flip
        out.append(torch.where(total > 0, m * (flip * share / n.clamp_min(1e-300)), 0.0))
    first = torch.where(total > 0, modes[0] * (sign * share / norms[0].clamp_min(1e-300)), 0.0)
    return [first, *out]


def curve(weight: Tensor, statistics: Statistics | None = None) -> list[Point]:
    """Return a few numbers of terms with the losses that were reached."""
    shape = tuple(weight.shape)
    most = max(1, min(full_rank(shape), math.prod(shape) // sum(shape)))
    return measured(_NAME, weight, statistics, shares=_GRID, most=most)


def to_tensor(factors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    return _product([factors[n] for n in _names(len(shape) - 2)])


def conv(factors: Mapping[str, Tensor], x: Tensor, geometry: ConvGeometry) -> Tensor:
    return after(factors, pointwise(x, factors["I"].T), geometry)


def after(factors: Mapping[str, Tensor], y: Tensor, geometry: ConvGeometry) -> Tensor:
    """Apply what follows the first factor, to y (batch, R, *space)."""
    rank, axes = factors["O"].shape[1], y.dim() - 2
    for axis in range(axes):
        taps = factors[f"K{axis}"]
        kernel = taps.T.reshape(rank, 1, *_alone(len(taps), 1, axis, axes))
        along = ConvGeometry(
            _alone(geometry.stride[axis], 1, axis, axes),
            _alone(geometry.padding[axis], 0, axis, axes),
            _alone(geometry.dilation[axis], 1, axis, axes),
        )
        y = convolve(y, kernel, along, groups=rank)
    return pointwise(y, factors["O"])


def _alone(value: int, rest: int, axis: int, axes: int) -> tuple[int, ...]:
    return tuple(value if i == axis else rest for i in range(axes))
