"""CP of a convolution: a sum of R rank-one kernels; its set is not closed, so a best one need not exist."""

from __future__ import annotations

import torch
from torch import Tensor

from ._statement import Case, Size, Statement, dimension, identity, random, rank_of

FORMULA = "W = Σ_r o_r ⊗ i_r ⊗ h_r ⊗ w_r"


def _text(size: Size) -> str:
    *modes, r = size
    return f"{'×'.join(map(str, modes))}, R={r}"


def _build(o: Tensor, i: Tensor, h: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("or,ir,hr,wr->oihw", o, i, h, w)


def _unfoldings(size: Size, g: torch.Generator) -> Case:
    *modes, r = size
    w = _build(*(random(g, m, r) for m in modes))
    found = max(rank_of(w.movedim(a, 0).reshape(m, -1)) for a, m in enumerate(modes))
    return Case(_text(size), f"at most {r}", str(found), found <= r)


def _outer(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.einsum("i,j,k->ijk", a, b, c)


def _open_set(size: Size, g: torch.Generator) -> Case:
    """T = u⊗u⊗w + u⊗w⊗u + w⊗u⊗u has rank 3, and two terms come as near as one likes while they grow without end."""
    n = float(size[0])
    u, w = identity(2)
    t = _outer(u, u, w) + _outer(u, w, u) + _outer(w, u, u)
    near = u + w / n
    first, second = n * _outer(near, near, near), n * _outer(u, u, u)
    error, norm = float((first - second - t).norm() / t.norm()), float(first.norm())
    return Case(
        f"terms scaled by {size[0]}",
        f"error below {2 / n:g}, norm above {n:g}",
        f"error {error:.2g}, norm {norm:.4g}",
        error < 2 / n and norm > n,
    )


STATEMENTS = (
    dimension(
        "The set has the dimension of its numbers less three scales per term.",
        "dim = R(O + I + k_h + k_w − 3)",
        [(4, 5, 3, 3, 2), (5, 4, 3, 3, 3)],
        shapes=lambda s: [(m, s[4]) for m in s[:4]],
        build=_build,
        count=lambda s: s[4] * (sum(s[:4]) - 3),
        text=_text,
    ),
    Statement("No unfolding has a rank above R.", "rank W_(a) ≤ R", [(6, 5, 3, 3, 2), (8, 8, 3, 3, 4)], _unfoldings),
    Statement(
        "The set is not closed: this tensor of rank 3 is the limit of tensors of rank 2 whose terms diverge.",
        "n(u + w/n)^{⊗3} − n u^{⊗3} → u⊗u⊗w + u⊗w⊗u + w⊗u⊗u",
        [(10,), (100,), (1000,)],
        _open_set,
    ),
)
