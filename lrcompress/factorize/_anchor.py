"""Undo the drift of the layers before: fit what the layer should have answered to what now reaches it.

The compressed prefix delivers x̂ in the place of x. For the blend x_β = (1−β) x̂ + β x the best full-rank replacement
of W on x̂ is A* = W + β W (C − Ŝ)(Ŝ + λI)⁻¹, and any form that is fitted to A* in the metric Ŝ is the best of its kind:
loss = (what no replacement reaches) + ‖A* − Ŵ‖²_Ŝ.

Source: the normal equations; β = 1 is the anchored SVD of arXiv 2604.02119. Damping C and Ŝ alike pulls A* to W.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._linalg import unfolded
from ._types import Factorization, Rank, Statistics, relative

#: Share of mean(diag Ŝ) that is added to C and Ŝ.
DAMPING = 1e-3


@dataclass(frozen=True)
class Drift:
    """Centred moments of the clean input x and of what the compressed prefix delivers, x̂, over the same positions.

    `clean` S (n, n), `cross` C = E[x x̂ᵀ] (n, n), `drifted` Ŝ (n, n), `clean_mean` μ and `drifted_mean` μ̂ (n,).
    """

    clean: Tensor
    cross: Tensor
    drifted: Tensor
    clean_mean: Tensor
    drifted_mean: Tensor

    def blended(self, beta: float) -> Drift:
        """Return the drift between x_β and x̂."""
        s, c, h = self.clean, self.cross, self.drifted
        mixed = (1 - beta) ** 2 * h + beta * (1 - beta) * (c + c.T) + beta**2 * s
        mean = (1 - beta) * self.drifted_mean + beta * self.clean_mean
        return replace(self, clean=mixed, cross=(1 - beta) * h + beta * c, clean_mean=mean)


def target(weight: Tensor, drift: Drift) -> Tensor:
    """Return A*, the best full-rank replacement of `weight` on the drifted input, shaped like it."""
    w = unfolded(weight).double()
    h = drift.drifted.double()
    scale = float(h.diagonal().mean())
    if not scale > 0:
        return weight.double()
    raised = h + DAMPING * scale * torch.eye(len(h), dtype=torch.float64)
    step: Tensor = torch.linalg.solve(raised, (w @ (drift.cross.double() - h)).T).T
    return (w + step).reshape(weight.shape)


def anchored(
    form_name: str, weight: Tensor, rank: Rank, drift: Drift, *, beta: float = 1.0, output_gram: Tensor | None = None
) -> Factorization:
    """Decompose so that the layer answers x̂ as it should have answered x_β; the bias carries both means.

    `loss` and `rel_error` are those of the outputs, E‖W x_β − Ŵ x̂‖²_G, the irreducible part included.
    """
    from . import form

    blend = drift.blended(beta)
    metric = Statistics(gram=blend.drifted, mean=blend.drifted_mean, output_gram=output_gram)
    found: Factorization = form(form_name).decompose(target(weight, blend), rank, metric)
    w, rebuilt = unfolded(weight).double(), unfolded(found.to_tensor()).double()
    crossed = w @ blend.cross.double() @ rebuilt.T
    outputs = w @ blend.clean.double() @ w.T
    residual = outputs - crossed - crossed.T + rebuilt @ blend.drifted.double() @ rebuilt.T
    loss = max(_weighed(residual, metric.g), 0.0)
    shift = w @ blend.clean_mean.double() - rebuilt @ blend.drifted_mean.double()
    dense = float((w - rebuilt).square().sum())
    return replace(
        found,
        factors={k: v.to(weight.dtype) if v.is_floating_point() else v for k, v in found.factors.items()},
        loss=loss, rel_error=relative(loss, _weighed(outputs, metric.g)), rel_error_frobenius=relative(dense, float(w.square().sum())),
        bias_shift=shift.to(weight.dtype),
    )  # fmt: skip


def _weighed(outputs: Tensor, g: Tensor | None) -> float:
    return float(outputs.trace() if g is None else (g * outputs).sum())
