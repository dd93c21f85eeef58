"""Spatial SVD of a convolution: rank r of the unfolding that keeps height with the inputs and width with the outputs."""

from __future__ import annotations

import torch

from ...factorize import form
from ._statement import Case, Size, Statement, dimension, distance, random, rank_of, same

FORMULA = "W[o, i, h, w] = Σ_r A[r, i, h] B[o, r, w]"


def text(size: Size) -> str:
    o, i, kh, kw, r = size
    return f"{o}×{i}×{kh}×{kw}, r={r}"


def _draw(size: Size, g: torch.Generator) -> torch.Tensor:
    o, i, kh, kw, r = size
    return torch.einsum("rih,orw->oihw", random(g, r, i, kh), random(g, o, r, kw))


def _unfolding(size: Size, g: torch.Generator) -> Case:
    o, i, kh, kw, r = size
    w = _draw(size, g)
    spatial, plain = rank_of(w.permute(1, 2, 0, 3).reshape(i * kh, o * kw)), rank_of(w.reshape(o, -1))
    return Case(text(size), f"{r}", f"{spatial} (as (out, in·kernel): {plain})", spatial == r)


def _recovered(size: Size, g: torch.Generator) -> Case:
    w = _draw(size, g)
    return same(text(size), distance(form("spatial_svd").decompose(w, size[-1]).to_tensor(), w))


STATEMENTS = (
    dimension(
        "The set has the dimension of rank-r matrices of that unfolding.",
        "dim = r(I·k_h + O·k_w) − r²",
        [(4, 3, 3, 3, 2), (5, 2, 3, 2, 3)],
        shapes=lambda s: [(s[4], s[1], s[2]), (s[0], s[4], s[3])],
        build=lambda a, b: torch.einsum("rih,orw->oihw", a, b),
        count=lambda s: s[4] * (s[1] * s[2] + s[0] * s[3]) - s[4] ** 2,
        text=text,
    ),
    Statement(
        "Its rank is that of the unfolding (in·height, out·width).",
        "rank W_[(i,h),(o,w)] = r",
        [(6, 4, 3, 3, 2), (8, 8, 3, 3, 5)],
        _unfolding,
    ),
    Statement("A kernel of that rank is found exactly.", "Ŵ = W", [(6, 4, 3, 3, 2), (8, 8, 3, 3, 5)], _recovered),
)
