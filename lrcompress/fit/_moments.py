"""Joint moments of what a layer should answer and of what it reads, batch by batch, as `Drift` wants them."""

from __future__ import annotations

from collections.abc import Iterable
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

#: Moments of the answers t to one batch, and their centred products with what was read.
Answers = tuple[Moments, Tensor]


@dataclass
class JointMoments:
    """Moments of the input x̂ and of the wanted answers t, and their products, all centred and merged exactly."""

    read: Moments = field(default_factory=Moments)
    wanted: Moments = field(default_factory=Moments)
    cross: Tensor | None = None
    #: Number and mean of what was read, batch by batch.
    parts: list[tuple[int, Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, wanted: Tensor, read: Tensor, walk: Walk | None, mask: Tensor | None) -> JointMoments:
        """Return those of one batch: `read` (…, in) or (batch, in, *space), `wanted` (…, out) or (batch, out, *space)."""
        own, read = cls(), wide(read)
        if walk is None:
            own.read.add(real_rows(read, mask))
        else:
            own.read = patch_moments(read, walk)
        if own.read.mean is None:  # a batch of padding only
            own.parts = [(0, torch.empty(0))]
            return own
        own.parts = [(own.read.count, own.read.mean.clone())]
        own.wanted, own.cross = answers_of(wanted, read, walk, mask)
        return own

    def add(self, wanted: Tensor, read: Tensor, walk: Walk | None, mask: Tensor | None) -> None:
        """Add one batch."""
        self.merge(JointMoments.of(wanted, read, walk, mask))

    def merge(self, other: JointMoments) -> None:
        """Add what `other` saw; it must not be used afterwards."""
        if other.cross is None or not other.read.count:
            self.parts = [*self.parts, *other.parts]
            return
        if self.cross is None:
            self.read, self.wanted, self.cross = other.read, other.wanted, other.cross
            self.parts = [*self.parts, *other.parts]
            return
        self.cross = self.cross + other.cross + _between(self.wanted, other.wanted, self.read, other.read)
        self.read.merge(other.read)
        self.wanted.merge(other.wanted)
        self.parts = [*self.parts, *other.parts]

    def answering(self, others: Iterable[Answers]) -> JointMoments:
        """Return the moments of the same inputs, which are not looked at again, with other answers.

        `others`: those of every batch, in the order in which they were added.
        """
        found, means = JointMoments(self.read, parts=self.parts), Moments()
        for (count, mean), (answers, cross) in zip(self.parts, others, strict=True):
            if not count:
                continue
            part = Moments(count, mean)
            if found.cross is None:
                found.wanted, found.cross, means = answers, cross, part
                continue
            found.cross = found.cross + cross + _between(found.wanted, answers, means, part)
            found.wanted.merge(answers)
            assert means.mean is not None
            total = means.count + count
            means = Moments(total, means.mean + (mean - means.mean) * (count / total))
        return found

    def copy(self) -> JointMoments:
        """Return moments that may be merged into."""
        return JointMoments(self.read.copy(), self.wanted.copy(), self.cross, list(self.parts))

    def drift(self) -> Drift:
        """Return the moments per position, on the CPU."""
        n = self.read.count
        assert n and self.cross is not None
        parts = [self.read.second, self.read.mean, self.cross, self.wanted.second, self.wanted.mean]
        s, mean, cross, answers, answer_mean = (p.cpu() for p in parts if p is not None)
        return Drift(_symmetric(s / n), mean, cross / n, _symmetric(answers / n), answer_mean)


def answers_of(wanted: Tensor, read: Tensor, walk: Walk | None, mask: Tensor | None) -> Answers:
    """Return the moments of one batch of answers, and Σ (t − t̄)(x̂ − mean)ᵀ."""
    answers, wanted, read = Moments(), wide(wanted), wide(read)
    if walk is None:
        rows, said = real_rows(read, mask), real_rows(wanted, mask)
        cross = product(said - said.mean(0), rows - rows.mean(0))
    else:
        said = by_group(wanted.movedim(1, -1).reshape(-1, wanted.shape[1]), walk.groups)
        cross = _patch_products(wanted, read, walk)
    answers.add(said)
    return answers, cross


def _between(wanted: Moments, more_wanted: Moments, read: Moments, more_read: Moments) -> Tensor:
    """Return what the distance of two parts' means adds to the centred products of the whole."""
    assert wanted.mean is not None and more_wanted.mean is not None and read.mean is not None
    assert more_read.mean is not None
    a, b = read.count, more_read.count
    off: Tensor = (more_wanted.mean - wanted.mean)[..., :, None] * (more_read.mean - read.mean)[..., None, :]
    return off * (a * b / (a + b))


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
