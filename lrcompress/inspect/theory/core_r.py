"""Core-R, the update of a factored layer: r² numbers that never leave the two spaces of its factors."""

from __future__ import annotations

import torch

from ._statement import Case, Size, Statement, distance, equal, jacobian_rank, random, rank_of, same
from .svd import text

FORMULA = "W' = U (I + R) V, U m×r and V r×n fixed, R r×r"


def _inside(size: Size, g: torch.Generator) -> Case:
    m, n, r = size
    u, v, core = random(g, m, r), random(g, r, n), random(g, r, r)
    w = u @ v + u @ core @ v
    found = rank_of(w), rank_of(torch.cat([u, w], 1)), rank_of(torch.cat([v, w]))
    return Case(
        text(size),
        f"rank {r}, with U {r}, with V {r}",
        f"rank {found[0]}, with U {found[1]}, with V {found[2]}",
        found == (r, r, r),
    )


def _best(size: Size, g: torch.Generator) -> Case:
    m, n, r = size
    u, v, wanted = random(g, m, r), random(g, r, n), random(g, m, n)
    core = torch.linalg.pinv(u) @ wanted @ torch.linalg.pinv(v)
    left, right = torch.linalg.qr(u)[0], torch.linalg.qr(v.T)[0]
    case = same(text(size), distance(u @ core @ v, left @ left.T @ wanted @ right @ right.T))
    missed = float((wanted - u @ core @ v).norm() / wanted.norm())
    return Case(
        case.size,
        case.expected,
        f"{case.found}; {missed:.0%} of a random ΔW stays out of reach",
        case.holds and missed > 0,
    )


def _gauge(size: Size, g: torch.Generator) -> Case:
    m, n, r = size
    u, v, gauge, core = random(g, m, r), random(g, r, n), random(g, r, r), random(g, r, r)
    back = torch.linalg.inv(gauge)
    wanted, other_u, other_v = u @ core @ v, u @ gauge, back @ v
    moved = distance(other_u @ (back @ core @ gauge) @ other_v, wanted)
    unmoved = distance(other_u @ core @ other_v, wanted)
    return Case(
        text(size),
        "T⁻¹RT the same, R another",
        f"relative differences {moved:.0e} and {unmoved:.1f}",
        moved <= 1e-8 and unmoved > 1e-2,
    )


def _dimension(size: Size, g: torch.Generator) -> Case:
    m, n, r = size
    u, v = random(g, m, r), random(g, r, n)
    return equal(text(size), r * r, jacobian_rank(lambda core: u @ v + u @ core @ v, [random(g, r, r)]))


STATEMENTS = (
    Statement(
        "The updates of one layer form a space of r² dimensions: no number is redundant.",
        "dim = r²",
        [(7, 9, 3), (6, 6, 2)],
        _dimension,
    ),
    Statement(
        "The updated weight stays of rank r, in the column space of U and the row space of V.",
        "col(W') ⊂ col(U), row(W') ⊂ row(V)",
        [(8, 9, 3), (12, 10, 5)],
        _inside,
    ),
    Statement(
        "The best core captures the projection of a wanted update, exactly that.",
        "R = U⁺ΔW V⁺, U R V = P_U ΔW P_V",
        [(8, 9, 3), (12, 10, 5)],
        _best,
    ),
    Statement(
        "A core belongs to its factors: in another gauge it is another one.",
        "R → T⁻¹RT",
        [(8, 9, 3), (12, 10, 5)],
        _gauge,
    ),
)
