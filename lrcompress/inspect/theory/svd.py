"""Rank r: W = U V."""

from __future__ import annotations

import torch

from ...factorize import form
from ._statement import EXACT, Case, Size, Statement, dimension, distance, random, rank_of

FORMULA = "W = U V, U m×r, V r×n"


def text(size: Size) -> str:
    m, n, r = size
    return f"{m}×{n}, r={r}"


def _bounded(size: Size, g: torch.Generator) -> Case:
    m, n, r = size
    found = rank_of(random(g, m, r) @ random(g, r, n))
    return Case(text(size), f"at most {r}", str(found), found <= r)


def _eckart_young(size: Size, g: torch.Generator) -> Case:
    """The truncated SVD reaches the tail, and alternating least squares from a random start gets no lower."""
    m, n, r = size
    w = random(g, m, n)
    tail = float(torch.linalg.svdvals(w)[r:].square().sum())
    loss = form("svd").decompose(w, r).loss
    u = random(g, m, r)
    for _ in range(500):
        v = torch.linalg.lstsq(u, w).solution
        u = torch.linalg.lstsq(v.T, w.T).solution.T
    other = float((w - u @ v).square().sum())
    holds = abs(loss - tail) <= EXACT * (1 + tail) and other >= tail * (1 - EXACT)
    return Case(text(size), f"{tail:.6f}, none lower", f"{loss:.6f}, a search reached {other:.6f}", holds)


def _smaller(size: Size, g: torch.Generator) -> Case:
    m, n, _ = size
    wrong = [r for r in range(1, min(m, n) + 1) if (form("svd").n_params((m, n), r) < m * n) != (r * (m + n) < m * n)]
    most = max((r for r in range(1, min(m, n) + 1) if form("svd").n_params((m, n), r) < m * n), default=0)
    return Case(
        f"{m}×{n}, every r",
        f"up to r = {(m * n - 1) // (m + n)}",
        f"up to r = {most}",
        not wrong and most == (m * n - 1) // (m + n),
    )


def _sum(size: Size, g: torch.Generator) -> Case:
    m, n, r = size
    a, b = (random(g, m, r) @ random(g, r, n) for _ in range(2))
    found, expected = rank_of(a + b), min(2 * r, m, n)
    exact = distance(form("svd").decompose(a + b, expected).to_tensor(), a + b) <= 1e-9
    return Case(
        text(size), f"rank {expected}: the set is not closed under sums", f"rank {found}", found == expected and exact
    )


STATEMENTS = (
    dimension(
        "The matrices of rank at most r form a set of smaller dimension than they have numbers: r² are redundant.",
        "dim = r(m + n − r) < r(m + n)",
        [(5, 7, 2), (6, 6, 3), (9, 4, 1), (8, 4, 4)],
        shapes=lambda s: [(s[0], s[2]), (s[2], s[1])],
        build=lambda u, v: u @ v,
        count=lambda s: s[2] * (s[0] + s[1] - s[2]),
        text=text,
    ),
    Statement("No choice of factors goes beyond rank r.", "rank(U V) ≤ r", [(6, 9, 2), (12, 12, 5)], _bounded),
    Statement(
        "The truncated SVD is the nearest of all of them.",
        "min ‖W − U V‖² = Σ_{i>r} σ_i²",
        [(6, 9, 2), (12, 12, 5)],
        _eckart_young,
    ),
    Statement(
        "It stores less than the dense matrix below the break-even rank only.",
        "r(m + n) < mn ⇔ r < mn/(m + n)",
        [(12, 12, 0), (30, 7, 0)],
        _smaller,
    ),
    Statement(
        "A sum of two such matrices needs twice the rank.",
        "rank(U₁V₁ + U₂V₂) = min(2r, m, n) generically",
        [(8, 9, 2), (6, 6, 4)],
        _sum,
    ),
)
