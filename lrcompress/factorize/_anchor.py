"""Undo the drift of the layers before: fit what the layer should answer to what now reaches it.

The compressed prefix delivers x̂ where the network itself has x, and the layer should answer t: W x, and where its
answer is added to a value that has drifted too (a shortcut), also what is missing there. For the blend
t_β = (1−β) W x̂ + β t the best full-rank replacement of W on x̂ is A* = W + β (T − W Ŝ)(Ŝ + λI)⁻¹ with T = E[t x̂ᵀ],
and any form that is fitted to A* in the metric Ŝ is the best of its kind:
loss = (what no replacement reaches) + ‖A* − Ŵ‖²_Ŝ. The bias carries both means.

Source: the normal equations; β = 1 with t = W x is the anchored SVD of arXiv 2604.02119. Adding λ to both sides pulls
A* to W, not to zero.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._types import Factorization, Rank, Statistics, relative, shrinkage

#: Share of mean(diag Ŝ) that is added to Ŝ (and to the input covariance in T).
DAMPING = 1e-3


@dataclass(frozen=True)
class Drift:
    """Centred moments, over the same positions, of the wanted answers t, bias left out, and of what arrives, x̂.

    `drifted` Ŝ (n, n), `cross` T = E[t x̂ᵀ] (m, n), `answers` E[t tᵀ] (m, m), and the means (n,) and (m,). Of a grouped
    convolution all carry a first axis of groups.
    """

    drifted: Tensor
    drifted_mean: Tensor
    cross: Tensor
    answers: Tensor
    answer_mean: Tensor

    @classmethod
    def of_inputs(
        cls, weight: Tensor, *, clean: Tensor, cross: Tensor, drifted: Tensor, clean_mean: Tensor, drifted_mean: Tensor
    ) -> Drift:
        """Return the drift of t = W x from moments of the inputs: S, C = E[x x̂ᵀ], Ŝ (n, n) and their means."""
        w = weight.double().reshape(len(weight), -1)
        return cls(drifted, drifted_mean, w @ cross, w @ clean @ w.mT, w @ clean_mean)

    def blended(self, weight: Tensor, beta: float) -> Drift:
        """Return the drift whose wanted answers are t_β."""
        w = self._matrix(weight)
        own = w @ self.drifted
        mixed = w @ self.cross.mT
        answers = (1 - beta) ** 2 * own @ w.mT + beta * (1 - beta) * (mixed + mixed.mT) + beta**2 * self.answers
        mean = (1 - beta) * _times(w, self.drifted_mean) + beta * self.answer_mean
        return replace(self, cross=(1 - beta) * own + beta * self.cross, answers=answers, answer_mean=mean)

    def shrunk(self, weight: Tensor, count: int) -> Drift:
        """Return what `count` positions say where they are fewer than inputs: directions unseen arrive as they were sent."""
        if not 0 < count < self.drifted.shape[-1]:
            return self
        w, (kept, more) = self._matrix(weight), shrinkage(self.drifted, count)
        eye = torch.eye(self.drifted.shape[-1], dtype=self.drifted.dtype, device=self.drifted.device)
        return replace(
            self, drifted=kept * self.drifted + more * eye, cross=kept * self.cross + more * w,
            answers=kept * self.answers + more * (w @ w.mT),
        )  # fmt: skip

    def target(self, weight: Tensor, beta: float = 1.0, damping: float = DAMPING) -> Tensor:
        """Return A*, the best full-rank replacement of `weight` on the drifted input, shaped like it, float64."""
        w, h = self._matrix(weight), self.drifted.double()
        scale = h.diagonal(dim1=-2, dim2=-1).mean(-1)
        if not bool((scale > 0).all()):
            return weight.double()
        raised = h + (damping * scale)[..., None, None] * torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
        step = torch.linalg.solve(raised, (self.cross - w @ h).mT).mT
        found: Tensor = (w + beta * step).reshape(weight.shape)
        return found

    def shift(self, rebuilt: Tensor) -> Tensor:
        """Return what to add to the bias (out,) so that `rebuilt`, shaped like the weight, answers with the right mean."""
        return (self.answer_mean - _times(self._matrix(rebuilt), self.drifted_mean)).flatten()

    def loss(self, rebuilt: Tensor, g: Tensor | None = None, shift: Tensor | None = None) -> float:
        """Return E‖t − Ŵ x̂ − shift‖²_G; without `shift` the mean is carried in full."""
        w = self._matrix(rebuilt)
        crossed = self.cross @ w.mT
        residual = self.answers - crossed - crossed.mT + w @ self.drifted @ w.mT
        if shift is not None:
            off = self.answer_mean - _times(w, self.drifted_mean) - shift.double().reshape(self.answer_mean.shape)
            residual = residual + off[..., :, None] * off[..., None, :]
        return max(_weighed(residual, g), 0.0)

    def total(self, g: Tensor | None = None) -> float:
        """Return E‖t − E t‖²_G, what an answer that is always the mean loses."""
        return max(_weighed(self.answers, g), 0.0)

    def _matrix(self, weight: Tensor) -> Tensor:
        """Return a weight as (…, m, n), float64."""
        return weight.double().reshape(*self.cross.shape[:-1], -1)


def anchored(
    form_name: str,
    weight: Tensor,
    rank: Rank,
    drift: Drift,
    *,
    beta: float = 1.0,
    output_gram: Tensor | None = None,
    damping: float = DAMPING,
) -> Factorization:
    """Decompose so that the layer answers x̂ as it should: t_β. The bias carries both means.

    `loss` and `rel_error` are those of the answers, E‖t_β − Ŵ x̂‖²_G, the irreducible part included.
    """
    from . import form

    groups = drift.drifted.shape[0] if drift.drifted.dim() == 3 else 1
    metric = Statistics(gram=drift.drifted, mean=drift.drifted_mean, output_gram=output_gram, groups=groups)
    # In double: the forms compute in it anyway, and A* may differ from W in digits that single precision has not.
    found: Factorization = form(form_name).decompose(drift.target(weight, beta, damping), rank, metric)
    blend = drift.blended(weight, beta)
    stored = {k: v.to(weight.dtype) if v.is_floating_point() else v for k, v in found.factors.items()}
    rebuilt = replace(found, factors=stored).to_tensor().double()
    loss = blend.loss(rebuilt, metric.g)
    off, size = (weight.double() - rebuilt).square().sum(), weight.double().square().sum()
    return replace(
        found, factors=stored, loss=loss, rel_error=relative(loss, blend.total(metric.g)),
        rel_error_frobenius=relative(float(off), float(size)), bias_shift=blend.shift(rebuilt).to(weight.dtype),
    )  # fmt: skip


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.double()[..., None])[..., 0]


def _weighed(outputs: Tensor, g: Tensor | None) -> float:
    return float(outputs.diagonal(dim1=-2, dim2=-1).sum() if g is None else (g * outputs).sum())
