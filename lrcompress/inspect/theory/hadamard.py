"""The entrywise product of two low-rank matrices: high rank from few numbers, but not every matrix of that rank."""

from __future__ import annotations

import torch
from torch import Tensor

from ._statement import (
    Case,
    Size,
    Statement,
    dimension,
    distance,
    equal,
    identity,
    jacobian_rank,
    low,
    random,
    rank_of,
    same,
)

FORMULA = "W = (B₁A₁)∘(B₂A₂), of ranks r₁ and r₂"


def text(size: Size) -> str:
    m, n, r1, r2 = size
    return f"{m}×{n}, r₁={r1}, r₂={r2}"


def shapes(size: Size) -> list[Size]:
    m, n, r1, r2 = size
    return [(m, r1), (r1, n), (m, r2), (r2, n)]


def build(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> Tensor:
    return (b1 @ a1) * (b2 @ a2)


def of_rank(m: int, n: int, r: int) -> int:
    """Return the dimension of the m×n matrices of rank at most r."""
    r = min(r, m, n)
    return r * (m + n - r)


def count(size: Size) -> int:
    """Return the dimension: both gauges and the common scaling of rows and columns are redundant."""
    m, n, r1, r2 = size
    free = (r1 + r2) * (m + n) - r1 * r1 - r2 * r2 - (m + n - 1)
    return min(free, m * n, of_rank(m, n, r1 * r2))


def expanded(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B₁ • B₂, A₁ ⊙ A₂): products of rows on the left, of columns on the right."""
    return torch.einsum("mr,ms->mrs", b1, b2).flatten(1), torch.einsum("rn,sn->rsn", a1, a2).flatten(0, 1)


def _rank(size: Size, g: torch.Generator) -> Case:
    m, n, r1, r2 = size
    return equal(text(size), min(r1 * r2, m, n), rank_of(build(*(random(g, *s) for s in shapes(size)))))


def _bound(size: Size, g: torch.Generator) -> Case:
    """Factors of less than their full rank too: the bound needs no genericity."""
    m, n, r1, r2 = size
    one, two = low(g, m, r1, r1 - 1) @ random(g, r1, n), low(g, m, r2, r2) @ random(g, r2, n)
    found, bound = rank_of(one * two), rank_of(one) * rank_of(two)
    return Case(f"{m}×{n}, ranks {rank_of(one)} and {rank_of(two)}", f"at most {bound}", str(found), found <= bound)


def _expansion(size: Size, g: torch.Generator) -> Case:
    factors = [random(g, *s) for s in shapes(size)]
    left, right = expanded(*factors)
    return same(text(size), distance(left @ right, build(*factors)))


def _contains_low_rank(size: Size, g: torch.Generator) -> Case:
    m, n, r1, r2 = size
    b, a = random(g, m, r1), random(g, r1, n)
    ones = torch.zeros(m, r2, dtype=b.dtype), torch.zeros(r2, n, dtype=b.dtype)
    ones[0][:, 0], ones[1][0] = 1.0, 1.0
    return same(text(size), distance(build(b, a, *ones), b @ a))


def _one_is_low_rank(size: Size, g: torch.Generator) -> Case:
    m, n, _, r2 = size
    found = jacobian_rank(build, [random(g, *s) for s in shapes(size)])
    rank = rank_of(build(*(random(g, *s) for s in shapes(size))))
    expected = of_rank(m, n, r2)
    return Case(text(size), f"dim {expected}, rank {r2}", f"dim {found}, rank {rank}", found == expected and rank == r2)


def strict(size: Size, g: torch.Generator) -> Case:
    """Fewer dimensions than the matrices of rank r₁r₂ have, measured on both sides."""
    m, n, r1, r2 = size
    r = min(r1 * r2, m, n)
    found = jacobian_rank(build, [random(g, *s) for s in shapes(size)])
    all_of_rank = jacobian_rank(lambda u, v: u @ v, [random(g, m, r), random(g, r, n)])
    return Case(
        text(size),
        f"below {of_rank(m, n, r)} (rank {r})",
        f"{found} against {all_of_rank}",
        found < all_of_rank == of_rank(m, n, r),
    )


def _identity(size: Size, g: torch.Generator) -> Case:
    p, q = size
    ones_p, ones_q = (torch.ones(n, n, dtype=torch.float64) for n in (p, q))
    one, two = torch.kron(identity(p), ones_q), torch.kron(ones_p, identity(q))
    exact = bool((one * two == identity(p * q)).all())
    found = (rank_of(one), rank_of(two), rank_of(one * two))
    return Case(
        f"p={p}, q={q}",
        f"ranks {p} and {q} give {p * q}",
        f"ranks {found[0]} and {found[1]} give {found[2]}",
        exact and found == (p, q, p * q),
    )


def _not_nested(size: Size, g: torch.Generator) -> Case:
    """At equal numbers, 2r(m + n): this form reaches rank r² > 2r, and rank 2r has more dimensions."""
    m, n, r, _ = size
    factors = [random(g, *s) for s in shapes(size)]
    rank, here = rank_of(build(*factors)), jacobian_rank(build, factors)
    there = jacobian_rank(lambda u, v: u @ v, [random(g, m, 2 * r), random(g, 2 * r, n)])
    return Case(
        text(size),
        f"rank above {2 * r}, fewer dimensions",
        f"rank {rank}, {here} dimensions against {there}",
        rank > 2 * r and here < there,
    )


STATEMENTS = (
    dimension(
        "The set has the dimension of its numbers less two gauges and one scaling of rows and columns.",
        "dim = (r₁ + r₂)(m + n) − r₁² − r₂² − (m + n − 1), at most mn and the dimension of rank r₁r₂",
        [(12, 12, 2, 2), (10, 9, 3, 2), (5, 5, 2, 2), (4, 6, 2, 2), (4, 4, 2, 2)],
        shapes=shapes, build=build, count=count, text=text,
    ),
    Statement("Generic factors reach the product of the ranks.", "rank W = min(r₁r₂, m, n)", [(12, 15, 3, 3), (9, 9, 2, 4), (7, 8, 3, 3)], _rank),
    Statement("No factors go beyond the product of the ranks.", "rank(X∘Y) ≤ rank X · rank Y", [(14, 15, 3, 3), (16, 16, 4, 3)], _bound),
    Statement(
        "It is a plain product of rank r₁r₂, with rows multiplied on the left and columns on the right.",
        "(B₁A₁)∘(B₂A₂) = (B₁ • B₂)(A₁ ⊙ A₂)", [(6, 8, 2, 3), (20, 15, 4, 4)], _expansion,
    ),
    Statement("It contains every matrix of rank r₁: the other product is all ones.", "U V = (U V)∘(1 1ᵀ)", [(8, 9, 3, 2), (12, 7, 4, 4)], _contains_low_rank),
    Statement("With r₁ = 1 it is nothing but rank r₂.", "dim = r₂(m + n − r₂), rank = r₂", [(6, 6, 1, 2), (7, 9, 1, 3)], _one_is_low_rank),
    Statement(
        "From r₁, r₂ = 2 on it misses matrices of rank r₁r₂: “rank up to r₁r₂” is not “every matrix of rank r₁r₂”.",
        "dim < dimension of rank min(r₁r₂, m, n)", [(5, 5, 2, 2), (4, 6, 2, 2), (12, 12, 2, 3)], strict,
    ),
    Statement(
        "The identity is a witness of full rank from small ranks.", "I_pq = (I_p⊗J_q)∘(J_p⊗I_q), J all ones", [(2, 3), (4, 4), (3, 5)], _identity
    ),
    Statement(
        "At equal numbers neither this form nor plain rank 2r contains the other.",
        "r₁ = r₂ = r ≥ 3: rank r² > 2r, dim < 2r(m + n − 2r)", [(12, 12, 3, 3), (20, 14, 3, 3)], _not_nested,
    ),
)  # fmt: skip
