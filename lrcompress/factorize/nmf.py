"""Non-negative factors by HALS; a weight of both signs is split, W = W₊ − W₋, and each part gets its own.

For counts, attention maps and other non-negative tables, where parts that only add are wanted; for a signed weight
the split doubles the rank that the same numbers buy elsewhere. One component at a time has a closed form,
v_k = max(0, R_kᵀ u_k / ‖u_k‖²); under input moments S the left factors are updated in that metric.

Source: Cichocki & Phan 2009 (HALS); Boutsidis & Gallopoulos 2008 (the start from the SVD).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import svd
from ._curves import measured
from ._linalg import unfolded
from ._types import Factorization, Point, Rank, Statistics

LAYERS = frozenset({"linear", "conv", "embedding"})
_NAME = __name__.rpartition(".")[2]
#: Constrained, and so never nearer than the SVD: not a default.
AUTO = False
_SWEEPS = 300

full_rank, clip = svd.full_rank, svd.clip
# U V is U V, however it was found.
to_tensor, linear, conv, embedding = svd.to_tensor, svd.linear, svd.conv, svd.embedding


def n_params(shape: tuple[int, ...], rank: Rank) -> int:
    """Count both parts, also the one that a weight of one sign does not have."""
    return 2 * svd.n_params(shape, rank)


def n_macs(shape: tuple[int, ...], rank: Rank, positions: int) -> int:
    return n_params(shape, rank) * positions


def decompose(weight: Tensor, rank: Rank, statistics: Statistics | None = None) -> Factorization:
    """Return `U` (out, 2r) and `V` (2r, in, *k), all entries of V at least 0: U ≥ 0 in its first r columns, ≤ 0 after.

    A part that is zero keeps its place with zeros, so that counts depend on the shape alone.
    """
    shape = tuple(weight.shape)
    if not isinstance(rank, int) or not 1 <= rank <= full_rank(shape):
        raise ValueError(f"expected a rank in 1…{full_rank(shape)}, got {rank}")
    if statistics is not None:
        statistics.check(weight)
    w, metric = unfolded(weight).double(), statistics or Statistics()
    pairs = [_part(w.clamp_min(0), rank, metric), _part((-w).clamp_min(0), rank, metric)]
    u = torch.cat([pairs[0][0], -pairs[1][0]], 1)
    v = torch.cat([pairs[0][1], pairs[1][1]])
    return Factorization.of(_NAME, {"U": u, "V": v.reshape(2 * rank, *weight.shape[1:])}, weight, rank, statistics)


def hals(w: Tensor, u: Tensor, v: Tensor, sweeps: int = _SWEEPS) -> tuple[Tensor, Tensor]:
    """Return non-negative U, V after at most `sweeps` passes over the components; the error never rises.

    A component that has died on one side is set on the row that is explained worst.
    """
    u, v = u.clone(), v.clone()
    before = float((w - u @ v).square().sum())
    for _ in range(sweeps):
        _components(w @ v.T, v @ v.T, u)
        vt = v.T.contiguous()
        _components(w.T @ u, u.T @ u, vt)
        v = vt.T.contiguous()
        dead = (u.sum(0) == 0) | (v.sum(1) == 0)
        after = float((w - u @ v).square().sum())
        if bool(dead.any()) and after > 1e-20 * float(w.square().sum()):
            _revive(w, u, v, int(dead.nonzero()[0]))
            after = float((w - u @ v).square().sum())
        elif not after < before * (1 - 1e-9):
            break
        before = after
    return u, v


def _components(target: Tensor, gram: Tensor, factor: Tensor) -> None:
    """Update the columns of `factor` ≥ 0 one after the other, in place: min ‖…‖² with normal matrix `gram`."""
    for k in range(factor.shape[1]):
        weight = gram[k, k]
        if float(weight) > 0:
            factor[:, k] = (factor[:, k] + (target[:, k] - factor @ gram[:, k]) / weight).clamp_min(0)


def _revive(w: Tensor, u: Tensor, v: Tensor, k: int) -> None:
    u[:, k] = 0
    residual = (w - u @ v).clamp_min(0)
    row = int(residual.square().sum(1).argmax())
    u[row, k], v[k] = 1.0, residual[row]


def _part(w: Tensor, rank: int, metric: Statistics) -> tuple[Tensor, Tensor]:
    rows, columns = w.shape
    if rank == min(rows, columns):  # exact without any search: the shorter side is its own basis
        if rows <= columns:
            return torch.eye(rows, dtype=w.dtype), w
        return w, torch.eye(columns, dtype=w.dtype)
    u, v = hals(w, *_start(w, rank))
    return _in_metric(w, u, v, metric), v


def _start(w: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the heavier of the positive and the negative halves of every singular pair."""
    p, d, qt = torch.linalg.svd(w, full_matrices=False)
    u, v = torch.zeros(len(w), rank, dtype=w.dtype), torch.zeros(rank, w.shape[1], dtype=w.dtype)
    for k in range(rank):
        halves = [(s * p[:, k]).clamp_min(0) for s in (1, -1)], [(s * qt[k]).clamp_min(0) for s in (1, -1)]
        sizes = [float(a.norm() * b.norm()) for a, b in zip(*halves, strict=True)]
        i = sizes.index(max(sizes))
        if sizes[i] > 0:
            scale = (float(d[k]) * sizes[i]) ** 0.5
            u[:, k], v[k] = halves[0][i] / halves[0][i].norm() * scale, halves[1][i] / halves[1][i].norm() * scale
    return u, v


def _in_metric(w: Tensor, u: Tensor, v: Tensor, metric: Statistics) -> Tensor:
    """Refit the left factor, still ≥ 0, in the metric of the right side; keep it only where the whole metric gains."""
    _, right = metric.sides
    if right is None:
        return u
    vs, moved = v @ right, u.clone()
    gram = vs @ v.T
    for _ in range(50):
        _components(w @ vs.T, gram, moved)
    return moved if metric.loss(w - moved @ v) < metric.loss(w - u @ v) else u


def curve(weight: Tensor, statistics: Statistics | None = None) -> list[Point]:
    """Return a few ranks with the losses that were reached."""
    return measured(_NAME, weight, statistics)
