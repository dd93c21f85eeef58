"""Tensor trains: one core per digit; two cores are a Kronecker sum already."""

from __future__ import annotations

import tensorly as tl
import torch
from tensorly.decomposition import tensor_train as tt_svd
from torch import Tensor

from ...factorize import form
from ...factorize.kronecker import blocks, rearrange
from ._statement import Case, Size, Statement, dimension, distance, equal, random, rank_of, same

FORMULA = "T = G₀ · G₁ · G₂, cores a×r₁, r₁×b×r₂, r₂×c"


def _text(size: Size) -> str:
    a, b, c, r1, r2 = size
    return f"{a}×{b}×{c}, r₁={r1}, r₂={r2}"


def _build(g0: Tensor, g1: Tensor, g2: Tensor) -> Tensor:
    return torch.einsum("ap,pbq,qc->abc", g0, g1, g2)


def _shapes(size: Size) -> list[Size]:
    a, b, c, r1, r2 = size
    return [(a, r1), (r1, b, r2), (r2, c)]


def _train(t: Tensor, ranks: list[int]) -> list[Tensor]:
    with tl.backend_context("pytorch", local_threadsafe=True):
        return list(tt_svd(t, rank=ranks).factors)


def _unfoldings(size: Size, g: torch.Generator) -> Case:
    a, b, c, r1, r2 = size
    t = _build(*(random(g, *s) for s in _shapes(size)))
    found = rank_of(t.reshape(a, b * c)), rank_of(t.reshape(a * b, c))
    return Case(_text(size), f"{r1} and {r2}", f"{found[0]} and {found[1]}", found == (r1, r2))


def _bounds(size: Size, g: torch.Generator) -> Case:
    a, b, c, r1, r2 = size
    t = random(g, a, b, c)
    cores = _train(t, [1, r1, r2, 1])
    error = float((t - _build(cores[0][0], cores[1], cores[2][..., 0])).square().sum())
    tails = [
        float(torch.linalg.svdvals(m)[r:].square().sum()) for m, r in ((t.reshape(a, -1), r1), (t.reshape(-1, c), r2))
    ]
    slack = 1e-9 * sum(tails)
    return Case(
        _text(size),
        f"{max(tails):.4f} … {sum(tails):.4f}",
        f"{error:.4f}",
        max(tails) - slack <= error <= sum(tails) + slack,
    )


def _two_cores(size: Size, g: torch.Generator) -> Case:
    m, n, terms = size
    w = random(g, m, n)
    first, second = blocks((m, n))
    one, two = _train(rearrange(w, first, second), [1, terms, 1])
    kronecker = rearrange(form("kronecker").decompose(w, terms).to_tensor(), first, second)
    return same(f"{m}×{n}, K={terms}", distance(one[0] @ two[..., 0], kronecker))


def _exact(size: Size, g: torch.Generator) -> Case:
    m, n = size
    module, w = form("tensor_train"), random(g, m, n)
    return same(
        f"{m}×{n}, rank {module.full_rank((m, n))}",
        distance(module.decompose(w, module.full_rank((m, n))).to_tensor(), w),
    )


def _full_rank_of_rank_one(size: Size, g: torch.Generator) -> Case:
    """One train of bond 1 is a Kronecker product of three matrices: full rank when they are square."""
    p = size[0]
    w = torch.kron(torch.kron(random(g, p, p), random(g, p, p)), random(g, p, p))
    return equal(f"three {p}×{p} cores, bonds 1", p**3, rank_of(w))


STATEMENTS = (
    dimension(
        "The set has the dimension of its numbers less one gauge per bond.",
        "dim = r₁a + r₁br₂ + r₂c − r₁² − r₂²",
        [(4, 3, 4, 2, 2), (5, 4, 3, 3, 2), (3, 5, 3, 1, 2)],
        shapes=_shapes,
        build=_build,
        count=lambda s: s[3] * s[0] + s[3] * s[1] * s[4] + s[4] * s[2] - s[3] ** 2 - s[4] ** 2,
        text=_text,
    ),
    Statement(
        "The bonds are the ranks of the unfoldings.",
        "rank T_(a)×(bc) = r₁, rank T_(ab)×(c) = r₂",
        [(4, 3, 5, 2, 3), (6, 4, 4, 3, 3)],
        _unfoldings,
    ),
    Statement(
        "TT-SVD lies between the largest tail of the unfoldings and their sum.",
        "max tail ≤ ‖T − T̂‖² ≤ Σ tails",
        [(6, 5, 6, 2, 2), (8, 4, 7, 3, 4)],
        _bounds,
    ),
    Statement(
        "Two cores are the Kronecker sum of as many terms.",
        "TT with bond K = Σ_{k≤K} B_k⊗C_k",
        [(12, 20, 2), (16, 36, 4)],
        _two_cores,
    ),
    Statement("At full bonds every matrix is reached.", "T̂ = T", [(12, 18), (30, 8)], _exact),
    Statement(
        "Bonds of 1 do not limit the rank of the matrix.",
        "rank(X⊗Y⊗Z) = rank X · rank Y · rank Z",
        [(2,), (4,)],
        _full_rank_of_rank_one,
    ),
)
