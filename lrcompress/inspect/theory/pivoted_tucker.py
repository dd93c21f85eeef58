"""Tucker-2 without redundancy: both bases keep some channels as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from ...factorize import form
from ._statement import Case, Size, Statement, dimension, distance, random, same
from .tucker import text

FORMULA = "W = Π_o [1; T] Z [1 S] Π_i, Z R_o×R_i×k², T (O − R_o)×R_o, S R_i×(I − R_i), Π permutations"


def _build(t: Tensor, z: Tensor, s: Tensor) -> Tensor:
    left = torch.cat([torch.eye(z.shape[0], dtype=z.dtype), t])
    right = torch.cat([torch.eye(z.shape[1], dtype=z.dtype), s], 1)
    return torch.einsum("oa,abk,bi->oik", left, z, right)


def _same_kernels(size: Size, g: torch.Generator) -> Case:
    o, i, k, ro, ri = size
    w = random(g, o, i, k)
    gauge, plain = (form(n).decompose(w, (ro, ri)).to_tensor() for n in ("pivoted_tucker", "tucker"))
    return same(text(size), distance(gauge, plain))


def _below_dense(size: Size, g: torch.Generator) -> Case:
    o, i, k, *_ = size
    count = {
        (a, b): form("pivoted_tucker").n_params((o, i, k), (a, b)) for a in range(1, o + 1) for b in range(1, i + 1)
    }
    real = {(a, b): n for (a, b), n in count.items() if a <= b * k and b <= a * k}
    over = [r for r, n in real.items() if n >= o * i * k and r != (o, i)]
    full = real[o, i]
    return Case(
        f"{o}×{i}×{k}, all {len(real)} ranks",
        f"dense at full ranks ({o * i * k}), less below",
        f"{full} at full ranks, {len(over)} others not less",
        full == o * i * k and not over,
    )


STATEMENTS = (
    dimension(
        "It has exactly as many numbers as the set of such kernels has dimensions: none is redundant.",
        "dim = O R_o + I R_i + R_o R_i k² − R_o² − R_i² = its parameter count",
        [(6, 5, 4, 2, 3), (5, 5, 9, 3, 2), (4, 7, 3, 3, 3)],
        shapes=lambda s: [(s[0] - s[3], s[3]), (s[3], s[4], s[2]), (s[4], s[1] - s[4])],
        build=_build,
        count=lambda s: form("pivoted_tucker").n_params(s[:3], s[3:]),
        text=text,
    ),
    Statement(
        "It represents the same kernels as the Tucker form of those ranks.",
        "U_o = Π_o [1; T] U_p and the same for U_i: U_p goes into the core",
        [(6, 5, 4, 2, 3), (8, 8, 9, 8, 5), (6, 7, 4, 3, 7)],
        _same_kernels,
    ),
    Statement(
        "It is smaller than dense at all ranks below full that a kernel can have.",
        "O I k² − count > 0 for R_o ≤ R_i k², R_i ≤ R_o k², not both full",
        [(8, 6, 9, 0, 0), (5, 12, 3, 0, 0)],
        _below_dense,
    ),
)
