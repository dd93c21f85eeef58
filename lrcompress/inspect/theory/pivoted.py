"""Rank r without redundancy: r rows as they are, the others as combinations of them."""

from __future__ import annotations

import torch

from ...factorize import form
from ._statement import Case, Size, Statement, dimension, distance, random, same
from .svd import text

FORMULA = "W = Π [P; T P], P r×n, T (m − r)×r, Π a permutation"


def _same_matrices(size: Size, g: torch.Generator) -> Case:
    m, n, r = size
    w = random(g, m, n)
    return same(
        text(size), distance(form("pivoted").decompose(w, r).to_tensor(), form("svd").decompose(w, r).to_tensor())
    )


def _below_dense(size: Size, g: torch.Generator) -> Case:
    m, n, _ = size
    ranks = range(1, min(m, n) + 1)
    saved = [m * n - form("pivoted").n_params((m, n), r) for r in ranks]
    holds = saved == [(m - r) * (n - r) for r in ranks]
    return Case(
        f"{m}×{n}, r = 1…{min(m, n)}", f"saves {(m - 1) * (n - 1)} … 0", f"saves {saved[0]} … {saved[-1]}", holds
    )


STATEMENTS = (
    dimension(
        "It has exactly as many numbers as the set of rank-r matrices has dimensions: none is redundant.",
        "dim = r(m + n) − r² = its parameter count",
        [(5, 7, 2), (6, 6, 3), (8, 4, 3), (9, 9, 1)],
        shapes=lambda s: [(s[2], s[1]), (s[0] - s[2], s[2])],
        build=lambda p, t: torch.cat([p, t @ p]),
        count=lambda s: form("pivoted").n_params((s[0], s[1]), s[2]),
        text=text,
    ),
    Statement(
        "It represents the same matrices as the SVD of that rank.",
        "Π [P; T P] = U V",
        [(7, 9, 3), (12, 8, 5), (6, 6, 6)],
        _same_matrices,
    ),
    Statement(
        "It is smaller than dense at every rank below full.",
        "mn − (r(m + n) − r²) = (m − r)(n − r)",
        [(12, 12, 0), (30, 7, 0)],
        _below_dense,
    ),
)
