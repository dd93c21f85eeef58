"""LoKr, the adapter: one Kronecker product, its second factor of rank r."""

from __future__ import annotations

import torch

from ._statement import Case, Size, Statement, dimension, distance, equal, identity, low, random, rank_of

FORMULA = "ΔW = W₁ ⊗ (a b), W₁ m₁×n₁, a m₂×r, b r×n₂"


def _text(size: Size) -> str:
    m1, n1, m2, n2, r = size
    return f"({m1}×{n1}) ⊗ ({m2}×{n2}), r={r}"


def _factors(size: Size, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    m1, n1, m2, n2, r = size
    return random(g, m1, n1), random(g, m2, r), random(g, r, n2)


def _rank(size: Size, g: torch.Generator) -> Case:
    m1, n1, _, _, r = size
    w1, a, b = _factors(size, g)
    return equal(_text(size), min(m1, n1) * r, rank_of(torch.kron(w1, a @ b)))


def _bound(size: Size, g: torch.Generator) -> Case:
    """A W₁ of lower rank: the product of the ranks, below the bound."""
    m1, n1, _, _, r = size
    _, a, b = _factors(size, g)
    w1 = low(g, m1, n1, min(m1, n1) - 1)
    found, expected = rank_of(torch.kron(w1, a @ b)), rank_of(w1) * rank_of(a @ b)
    return Case(_text(size), f"{expected}, at most {min(m1, n1) * r}", str(found), found == expected <= min(m1, n1) * r)


def _expansion(size: Size, g: torch.Generator) -> Case:
    m1, n1, _, _, r = size
    w1, a, b = _factors(size, g)
    exact = torch.kron(w1, a @ b)
    pairs = (torch.kron(w1, a), torch.kron(identity(n1), b)), (torch.kron(identity(m1), a), torch.kron(w1, b))
    errors = [distance(left @ right, exact) for left, right in pairs]
    ranks = [right.shape[0] for _, right in pairs]
    holds = max(errors) <= 1e-12 and min(ranks) == min(m1, n1) * r
    return Case(
        _text(size),
        f"the smaller rank is {min(m1, n1) * r}",
        f"ranks {ranks[0]} and {ranks[1]}, relative difference {max(errors):.0e}",
        holds,
    )


def _both_split(size: Size, g: torch.Generator) -> Case:
    m1, n1, _, _, r = size
    inner = min(m1, n1) - 1
    u, v = random(g, m1, inner), random(g, inner, n1)
    _, a, b = _factors(size, g)
    left, right = torch.kron(u, a), torch.kron(v, b)
    error, rank = distance(left @ right, torch.kron(u @ v, a @ b)), rank_of(left @ right)
    return Case(
        f"{_text(size)}, W₁ of inner rank {inner}",
        f"rank {inner * r}",
        f"rank {rank}, relative difference {error:.0e}",
        error <= 1e-12 and rank == inner * r,
    )


STATEMENTS = (
    Statement("Generic factors reach the smaller side of W₁ times r.", "rank ΔW = min(m₁, n₁)·r", [(4, 3, 5, 6, 2), (3, 6, 8, 7, 3)], _rank),
    Statement("The rank is the product of the ranks, and no more.", "rank ΔW = rank W₁ · rank(a b) ≤ min(m₁, n₁)·r", [(4, 3, 5, 6, 2), (5, 5, 6, 6, 3)], _bound),
    Statement(
        "It is LoRA of that rank exactly, from either side; one takes the smaller.",
        "W₁⊗(ab) = (W₁⊗a)(I⊗b) = (I⊗a)(W₁⊗b)", [(4, 3, 5, 6, 2), (3, 6, 8, 7, 3)], _expansion,
    ),
    Statement("With W₁ split as well, the ranks multiply.", "(uv)⊗(ab) = (u⊗a)(v⊗b)", [(4, 4, 5, 6, 2), (5, 6, 4, 4, 3)], _both_split),
    dimension(
        "The set has the dimension of its numbers less the gauge of a b and one common scale.",
        "dim = m₁n₁ + r(m₂ + n₂ − r) − 1",
        [(3, 2, 4, 5, 2), (2, 4, 5, 5, 3), (3, 3, 4, 4, 1)],
        shapes=lambda s: [(s[0], s[1]), (s[2], s[4]), (s[4], s[3])],
        build=lambda w1, a, b: torch.einsum("ij,ab->iajb", w1, a @ b),
        count=lambda s: s[0] * s[1] + s[4] * (s[2] + s[3] - s[4]) - 1,
        text=_text,
    ),
)  # fmt: skip
