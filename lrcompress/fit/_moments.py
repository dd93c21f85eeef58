"""Joint moments of what a layer should answer and of what it reads, batch by batch, as `Drift` wants them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calibrate import Moments
from ..calibrate.collected import real_rows
from ..calibrate.moments import product, wide
from ..calibrate.patch_moments import by_group, patch_moments
from ..factorize import Drift
from ..model.views import Walk
from ..model.views.walk import padded


@dataclass
class JointMoments:
    """Moments of the input x̂ and of the wanted answers t, and their products, all centred and merged exactly."""

    read: Moments = field(default_factory=Moments)
    wanted: Moments = field(default_factory=Moments)
    cross: Tensor | None = None

    def add(self, wanted: Tensor, read: Tensor, walk: Walk | None, mask: Tensor | None) -> None:
        """Add one batch: `read` (…, in) or (batch, in, *space), `wanted` (…, out) or (batch, out, *space) alike."""
        own, wanted, read = JointMoments(), wide(wanted), wide(read)
        if walk is None:
            rows, answers = real_rows(read, mask), real_rows(wanted, mask)
            own.read.add(rows)
            centred = answers - answers.mean(0)
            own.cross = product(centred, rows - rows.mean(0))
        else:
            answers = by_group(wanted.movedim(1, -1).reshape(-1, wanted.shape[1]), walk.groups)
            own.read = patch_moments(read, walk)
            own.cross = _patch_products(wanted, read, walk)
        own.wanted.add(answers)
        self.merge(own)

    def merge(self, other: JointMoments) -> None:
        """Add what `other` saw; it must not be used afterwards."""
        if other.cross is None or not other.read.count:
            return
        if self.cross is None or self.read.mean is None or self.wanted.mean is None:
            self.read, self.wanted, self.cross = other.read, other.wanted, other.cross
            return
        assert other.read.mean is not None and other.wanted.mean is not None
        a, b = self.read.count, other.read.count
        off = (other.wanted.mean - self.wanted.mean)[..., :, None] * (other.read.mean - self.read.mean)[..., None, :]
        self.cross = self.cross + other.cross + off * (a * b / (a + b))
        self.read.merge(other.read)
        self.wanted.merge(other.wanted)

    def copy(self) -> JointMoments:
        """Return moments that may be merged into."""
        return JointMoments(self.read.copy(), self.wanted.copy(), self.cross)

    def drift(self) -> Drift:
        """Return the moments per position, on the CPU."""
        n = self.read.count
        assert n and self.cross is not None
        parts = [self.read.second, self.read.mean, self.cross, self.wanted.second, self.wanted.mean]
        s, mean, cross, answers, answer_mean = (p.cpu() for p in parts if p is not None)
        return Drift(_symmetric(s / n), mean, cross / n, _symmetric(answers / n), answer_mean)


def _symmetric(m: Tensor) -> Tensor:
    return (m + m.mT) / 2


def _patch_products(wanted: Tensor, read: Tensor, walk: Walk) -> Tensor:
    """Return Σ over positions of (t − t̄) pᵀ, (out, in·kernel) or (groups, out, in·kernel): the gradient of a kernel.

    What is taken from all p, a mean per channel, adds Σ (t − t̄) = 0 and saves digits.
    """
    axes = tuple(range(2, wanted.dim()))
    centred = wanted - wanted.mean((0, *axes), keepdim=True)
    centred = centred - centred.mean((0, *axes), keepdim=True)  # the rounding of a large mean would meet padded zeros
    x = padded(read, walk) - read.mean((0, *axes), keepdim=True)
    kernel = torch.empty(wanted.shape[1], read.shape[1] // walk.groups, *walk.kernel, dtype=x.dtype, device=x.device)
    zeros = [0] * len(walk.kernel)
    gradients = torch.ops.aten.convolution_backward(
        centred.contiguous(), x, kernel, None, list(walk.stride), zeros, list(walk.dilation), False, zeros, walk.groups,
        [False, True, False],
    )  # fmt: skip
    found: Tensor = gradients[1].double().reshape(wanted.shape[1], -1)
    return found if walk.groups == 1 else found.reshape(walk.groups, -1, found.shape[1])
