"""Tucker-2 of a convolution: two bases and a core."""

from __future__ import annotations

import torch
from torch import Tensor

from ...factorize import form
from ._statement import Case, Size, Statement, dimension, random, rank_of

FORMULA = "W = Z ×₀ U_out ×₁ U_in, Z R_o×R_i×k²"


def text(size: Size) -> str:
    o, i, k, ro, ri = size
    return f"{o}×{i}×{k}, R_o={ro}, R_i={ri}"


def _shapes(size: Size) -> list[Size]:
    o, i, k, ro, ri = size
    return [(o, ro), (ro, ri, k), (i, ri)]


def _build(u: Tensor, z: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("oa,abk,ib->oik", u, z, v)


def _mode_ranks(size: Size, g: torch.Generator) -> Case:
    o, i, _, ro, ri = size
    w = _build(*(random(g, *s) for s in _shapes(size)))
    found = rank_of(w.reshape(o, -1)), rank_of(w.transpose(0, 1).reshape(i, -1))
    return Case(text(size), f"{ro} and {ri}", f"{found[0]} and {found[1]}", found == (ro, ri))


def _bounds(size: Size, g: torch.Generator) -> Case:
    o, i, k, ro, ri = size
    w = random(g, o, i, k)
    tails = [
        float(torch.linalg.svdvals(w.reshape(o, -1))[ro:].square().sum()),
        float(torch.linalg.svdvals(w.transpose(0, 1).reshape(i, -1))[ri:].square().sum()),
    ]
    loss = form("tucker").decompose(w, (ro, ri)).loss
    slack = 1e-9 * sum(tails)
    return Case(
        text(size),
        f"{max(tails):.4f} … {sum(tails):.4f}",
        f"{loss:.4f}",
        max(tails) - slack <= loss <= sum(tails) + slack,
    )


STATEMENTS = (
    dimension(
        "The set has the dimension of its numbers less one gauge per basis.",
        "dim = O R_o + I R_i + R_o R_i k² − R_o² − R_i²",
        [(6, 5, 4, 2, 3), (5, 5, 9, 3, 2), (4, 7, 3, 3, 3)],
        shapes=_shapes,
        build=_build,
        count=lambda s: s[0] * s[3] + s[1] * s[4] + s[3] * s[4] * s[2] - s[3] ** 2 - s[4] ** 2,
        text=text,
    ),
    Statement(
        "The ranks of the two unfoldings are those of the bases.",
        "rank W_(o) = R_o, rank W_(i) = R_i",
        [(6, 5, 4, 2, 3), (8, 8, 9, 4, 5)],
        _mode_ranks,
    ),
    Statement(
        "The loss lies between the larger mode tail and the sum of both.",
        "max(t_o, t_i) ≤ ‖W − Ŵ‖² ≤ t_o + t_i",
        [(8, 6, 9, 3, 3), (10, 10, 4, 5, 4)],
        _bounds,
    ),
)
