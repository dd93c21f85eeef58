"""What a product reads, before and after the products that feed it were rounded: the moments a refit is made of.

    z = A x,  ẑ = A_q x̂:        S = E[z zᵀ],  C = E[z ẑᵀ],  G = E[ẑ ẑᵀ]          (z − mean where a bias takes the means)

At the start of a chain z = ẑ. Along linear products the moments follow in closed form; along convolutions, whose
patches overlap, they are taken from samples that are walked through both chains.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .moments import Seen, Walk


@dataclass
class Joint:
    """Of one value: moments per group (groups, n, n), means (groups, n); of images, the samples of both chains."""

    s: Tensor
    c: Tensor
    g: Tensor
    mean: Tensor
    mean_hat: Tensor
    clean: Tensor | None = None
    rounded: Tensor | None = None

    @classmethod
    def root(cls, seen: Seen) -> Joint:
        s = seen.second
        return cls(s, s, s, seen.mean, seen.mean, seen.samples, seen.samples)

    @classmethod
    def of_samples(cls, clean: Tensor, rounded: Tensor, walk: Walk) -> Joint:
        """Return the moments of what `walk` reads in images of both chains."""
        z, zh = (walk.patches(x).flatten(0, -3).transpose(0, 1).double() for x in (clean, rounded))
        n = max(z.shape[1], 1)
        s, c, g = (a.transpose(1, 2) @ b / n for a, b in ((z, z), (z, zh), (zh, zh)))
        return cls(s, c, g, z.mean(1), zh.mean(1), clean, rounded)

    def through(self, weight: Tensor, coded: Tensor) -> Joint:
        """Return the moments of what a linear product makes of this: `weight` (out, in) and what it was rounded to."""
        a, b = weight.double(), coded.double()
        return Joint(
            a @ self.s @ a.T, a @ self.c @ b.T, b @ self.g @ b.T, self.mean @ a.T, self.mean_hat @ b.T
        )  # fmt: skip

    def centred(self) -> Joint:
        """Return the moments about the means."""
        outer = [torch.einsum("gi,gj->gij", a, b) for a, b in ((self.mean, self.mean), (self.mean, self.mean_hat), (self.mean_hat, self.mean_hat))]  # fmt: skip
        s, c, g = (m - o for m, o in zip((self.s, self.c, self.g), outer, strict=True))
        return Joint(s, c, g, self.mean, self.mean_hat, self.clean, self.rounded)

    @property
    def drifted(self) -> bool:
        return self.c is not self.s

    def group(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.s[i], self.c[i], self.g[i]


def refitted(weight: Tensor, c: Tensor, g: Tensor, ridge: float = 1e-4) -> Tensor:
    """Return the weight that, reading ẑ, comes nearest to what `weight` made of z: W C (G + λI)⁻¹, pulled towards W.

    Source: ordinary least squares with a ridge towards the weight that was there.
    """
    w = weight.double()
    scale = float(g.diagonal().mean())
    if not scale > 0:
        return w
    lam = ridge * scale
    eye = torch.eye(len(g), dtype=g.dtype)
    found: Tensor = torch.linalg.solve(g + lam * eye, (w @ c + lam * w).T).T
    return found


def lost(weight: Tensor, coded: Tensor, s: Tensor, c: Tensor, g: Tensor) -> tuple[float, float]:
    """Return E‖W z − Q ẑ‖² and E‖W z‖²."""
    w, q = weight.double(), coded.double()
    whole = float(((w @ s) * w).sum())
    cross = float(((w @ c) * q).sum())
    return max(whole - 2 * cross + float(((q @ g) * q).sum()), 0.0), whole
