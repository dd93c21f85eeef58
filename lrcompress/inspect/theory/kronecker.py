"""Sums of Kronecker products: full rank from one term, but many terms for a rank-one matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ...factorize import form
from ...factorize.kronecker import blocks, rearrange
from ._statement import EXACT, Case, Size, Statement, dimension, distance, equal, low, random, rank_of

FORMULA = "W = Σ_k B_k ⊗ C_k, B_k m₁×n₁, C_k m₂×n₂"


def _text(size: Size) -> str:
    m1, n1, m2, n2, *terms = size
    return f"({m1}×{n1}) ⊗ ({m2}×{n2})" + (f", K={terms[0]}" if terms else "")


def _build(b: Tensor, c: Tensor) -> Tensor:
    return torch.einsum("kij,kab->iajb", b, c)


def _product_of_ranks(size: Size, g: torch.Generator) -> Case:
    m1, n1, m2, n2 = size
    b, c = low(g, m1, n1, max(1, min(m1, n1) - 1)), low(g, m2, n2, max(1, min(m2, n2) - 1))
    return equal(_text(size), rank_of(b) * rank_of(c), rank_of(torch.kron(b, c)))


def _singular_values(size: Size, g: torch.Generator) -> Case:
    m1, n1, m2, n2 = size
    b, c = random(g, m1, n1), random(g, m2, n2)
    products = torch.outer(torch.linalg.svdvals(b), torch.linalg.svdvals(c)).flatten().sort(descending=True).values
    found = torch.linalg.svdvals(torch.kron(b, c))
    error = distance(found[: len(products)], products)
    return Case(
        _text(size),
        f"{len(products)} products",
        f"relative difference {error:.0e}",
        error <= EXACT and float(found[len(products) :].sum()) <= EXACT,
    )


def _identity(size: Size, g: torch.Generator) -> Case:
    p, q = size
    eye = torch.eye(p * q, dtype=torch.float64)
    terms, rank = rank_of(rearrange(eye, (p, p), (q, q))), rank_of(eye)
    return Case(f"p={p}, q={q}", f"1 term, rank {p * q}", f"{terms} term, rank {rank}", terms == 1 and rank == p * q)


def _terms_of_rank_one(size: Size, g: torch.Generator) -> Case:
    m1, n1, m2, n2 = size
    u, v = random(g, m1 * m2), random(g, n1 * n2)
    u_rank, v_rank = rank_of(u.reshape(m1, m2)), rank_of(v.reshape(n1, n2))
    return equal(_text(size), u_rank * v_rank, rank_of(rearrange(torch.outer(u, v), (m1, n1), (m2, n2))), "terms")


def _van_loan(size: Size, g: torch.Generator) -> Case:
    m, n, terms = size
    w = random(g, m, n)
    first, second = blocks((m, n))
    tail = float(torch.linalg.svdvals(rearrange(w, first, second))[terms:].square().sum())
    found = form("kronecker").decompose(w, terms).loss
    return Case(f"{m}×{n}, K={terms}", f"{tail:.6f}", f"{found:.6f}", abs(found - tail) <= EXACT * (1 + tail))


def _not_nested(size: Size, g: torch.Generator) -> Case:
    """One term has a rank that its numbers do not buy as U V, and the rank-one matrix needs more terms than it."""
    m1, n1, m2, n2 = size
    m, n = m1 * m2, n1 * n2
    numbers = m1 * n1 + m2 * n2
    affordable = numbers // (m + n)
    rank = rank_of(torch.kron(random(g, m1, n1), random(g, m2, n2)))
    terms = rank_of(rearrange(torch.outer(random(g, m), random(g, n)), (m1, n1), (m2, n2)))
    within = (m + n) // numbers
    holds = rank > affordable and terms > within
    return Case(_text(size), f"rank above {affordable}; above {within} terms", f"rank {rank}; {terms} terms", holds)


STATEMENTS = (
    dimension(
        "The set of K terms has the dimension of its numbers less K².",
        "dim = K(m₁n₁ + m₂n₂) − K²",
        [(2, 3, 3, 2, 1), (3, 2, 2, 4, 2), (3, 3, 3, 3, 3)],
        shapes=lambda s: [(s[4], s[0], s[1]), (s[4], s[2], s[3])],
        build=_build,
        count=lambda s: s[4] * (s[0] * s[1] + s[2] * s[3]) - s[4] ** 2,
        text=_text,
    ),
    Statement(
        "The rank of one term is the product of the ranks.",
        "rank(B⊗C) = rank B · rank C",
        [(4, 3, 3, 5), (5, 5, 4, 4)],
        _product_of_ranks,
    ),
    Statement(
        "Its singular values are all products of theirs.",
        "σ(B⊗C) = {σ_i(B)·σ_j(C)}",
        [(4, 3, 3, 5), (2, 6, 5, 2)],
        _singular_values,
    ),
    Statement(
        "The identity is one term: full rank from p² + q² numbers.", "I_pq = I_p⊗I_q", [(3, 4), (8, 8)], _identity
    ),
    Statement(
        "A matrix of rank one can need many terms.",
        "terms of u vᵀ = rank(mat u) · rank(mat v)",
        [(3, 4, 5, 2), (4, 4, 4, 4)],
        _terms_of_rank_one,
    ),
    Statement(
        "The SVD of the rearranged matrix gives the nearest sum.",
        "min ‖W − Σ B_k⊗C_k‖² = Σ_{i>K} σ_i²(R(W))",
        [(12, 20, 2), (16, 36, 5)],
        _van_loan,
    ),
    Statement(
        "At equal numbers neither one term nor plain low rank contains the other.",
        "min(m₁,n₁)·min(m₂,n₂) > (m₁n₁ + m₂n₂)/(m + n), and back",
        [(4, 4, 4, 4), (6, 5, 5, 6)],
        _not_nested,
    ),
)
