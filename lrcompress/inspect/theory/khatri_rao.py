"""Khatri-Rao chains and sums: generically of full rank from few numbers, with a trap where a column is zero."""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

from ...factorize import form
from ...factorize.kronecker import split
from ._statement import EXACT, Case, Size, Statement, dimension, equal, random, rank_of

FORMULA = "W = A₁ ⊙ A₂ ⊙ … (columns are Kronecker products), A_i m_i×n, m = Π m_i"

_TRIALS = 200


def khatri_rao(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("in,jn->ijn", a, b).flatten(0, 1)


def _chain(*factors: Tensor) -> Tensor:
    return functools.reduce(khatri_rao, factors)


def _text(size: Size) -> str:
    *rows, n = size
    return f"{'·'.join(map(str, rows))} rows, {n} columns"


def _integers(g: torch.Generator, rows: int, columns: int) -> Tensor:
    return torch.randint(-2, 3, (rows, columns), generator=g).double()


def _full_rank(size: Size, g: torch.Generator) -> Case:
    *rows, n = size
    return equal(_text(size), min(math.prod(rows), n), rank_of(_chain(*(random(g, m, n) for m in rows))))


def _at_least(size: Size, g: torch.Generator) -> Case:
    """Small integers: many drawn matrices are rank-deficient or have parallel columns."""
    i, j, n = size
    tried = broken = 0
    while tried < _TRIALS:
        a, b = _integers(g, i, n), _integers(g, j, n)
        if bool((a == 0).all(0).any() or (b == 0).all(0).any()):
            continue
        tried += 1
        broken += rank_of(khatri_rao(a, b)) < max(rank_of(a), rank_of(b))
    return Case(_text(size), "never below", f"{broken} of {tried} integer pairs below", broken == 0)


def _counterexample(size: Size, g: torch.Generator) -> Case:
    a, b = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    found, larger = rank_of(khatri_rao(a, b)), max(rank_of(a), rank_of(b))
    return Case("[[1, 0], [0, 0]] ⊙ I₂", f"below {larger}", f"rank {found}", found < larger)


def kruskal_rank(a: Tensor) -> int:
    """Return the largest k such that every k columns are independent."""
    for k in range(a.shape[1], 0, -1):
        if all(rank_of(a[:, list(c)]) == k for c in itertools.combinations(range(a.shape[1]), k)):
            return k
    return 0


def _kruskal(size: Size, g: torch.Generator) -> Case:
    i, j, n = size
    tried = broken = 0
    while tried < _TRIALS // 4:
        a, b = _integers(g, i, n), _integers(g, j, n)
        ka, kb = kruskal_rank(a), kruskal_rank(b)
        if min(ka, kb) < 1:
            continue
        tried += 1
        broken += kruskal_rank(khatri_rao(a, b)) < min(ka + kb - 1, n)
    return Case(_text(size), "never below", f"{broken} of {tried} integer pairs below", broken == 0)


def _per_column(size: Size, g: torch.Generator) -> Case:
    m, n, terms = size
    w = random(g, m, n)
    tail = float(torch.linalg.svdvals(w.T.reshape(n, *split(m)))[:, terms:].square().sum())
    found = form("khatri_rao").decompose(w, terms).loss
    return Case(f"{m}×{n}, K={terms}", f"{tail:.6f}", f"{found:.6f}", abs(found - tail) <= EXACT * (1 + tail))


STATEMENTS = (
    dimension(
        "The set of chains of t factors loses one scale per column and join.",
        "dim = n(Σ m_i − t + 1)",
        [(2, 3, 5), (3, 4, 4), (2, 2, 3, 4)],
        shapes=lambda s: [(m, s[-1]) for m in s[:-1]],
        build=_chain,
        count=lambda s: s[-1] * (sum(s[:-1]) - (len(s) - 1) + 1),
        text=_text,
    ),
    dimension(
        "A sum of K terms is one matrix of rank K per column.",
        "dim = n·K(I + J − K)",
        [(3, 4, 3, 2), (4, 4, 2, 3)],
        shapes=lambda s: [(s[3], s[0], s[2]), (s[3], s[1], s[2])],
        build=lambda a, b: torch.einsum("kin,kjn->ijn", a, b),
        count=lambda s: s[2] * s[3] * (s[0] + s[1] - s[3]),
        text=lambda s: f"{_text(s[:3])}, K={s[3]}",
    ),
    Statement(
        "Generic factors reach full rank.",
        "rank W = min(Π m_i, n)",
        [(3, 4, 10), (4, 4, 20), (2, 3, 4, 17)],
        _full_rank,
    ),
    Statement(
        "Without a zero column the rank is at least that of either factor.",
        "rank(A⊙B) ≥ max(rank A, rank B)",
        [(2, 3, 4), (3, 3, 5)],
        _at_least,
    ),
    Statement("With a zero column it need not be.", "rank(A⊙B) < max(rank A, rank B) happens", [()], _counterexample),
    Statement(
        "Kruskal ranks add up.", "k(A⊙B) ≥ min(k_A + k_B − 1, n) where k_A, k_B ≥ 1", [(2, 3, 4), (3, 3, 5)], _kruskal
    ),
    Statement(
        "The best K terms are the SVD of every column on its own.",
        "min ‖W − Σ A_k⊙B_k‖² = Σ_j Σ_{i>K} σ_i²(mat w_j)",
        [(12, 7, 1), (16, 10, 2)],
        _per_column,
    ),
)
