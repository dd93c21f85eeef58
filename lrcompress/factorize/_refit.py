"""Least squares for one factor at a time, in any metric: what the forms without a closed form are made of.

A product form is linear in each of its factors, so minimising ⟨E, L E R⟩ over one of them is a positive
semidefinite system, solved by conjugate gradients on its normal equations. The loss never rises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._types import Statistics

Build = Callable[[Mapping[str, Tensor]], Tensor]


def refit(
    build: Build, factors: Mapping[str, Tensor], name: str, weight: Tensor, metric: Statistics, steps: int = 30
) -> Tensor:
    """Return the factor `name` that minimises metric.loss(weight − build(factors)), from its present value on.

    `build` must be linear in that factor. Source: Hestenes & Stiefel 1952, on the normal equations (CGLS).
    """

    def rebuilt(value: Tensor) -> Tensor:
        return build({**factors, name: value})

    value = factors[name].detach().clone()
    pulled: Any = torch.func.vjp(rebuilt, value)  # of a linear map: the same at every point
    adjoint = pulled[1]
    residual = weight - rebuilt(value)
    gradient = adjoint(metric.weighted(residual))[0]
    direction, energy = gradient, float(gradient.square().sum())
    floor = energy * 1e-24
    for _ in range(steps):
        if not energy > floor:
            break
        image = rebuilt(direction)
        curvature = float((image * metric.weighted(image)).sum())
        if not curvature > 0:
            break
        length = energy / curvature
        value = value + length * direction
        residual = residual - length * image
        gradient = adjoint(metric.weighted(residual))[0]
        fresh = float(gradient.square().sum())
        direction, energy = gradient + (fresh / energy) * direction, fresh
    return value


def sweep(
    build: Build,
    factors: Mapping[str, Tensor],
    weight: Tensor,
    metric: Statistics,
    *,
    names: Sequence[str],
    sweeps: int,
    steps: int = 30,
) -> dict[str, Tensor]:
    """Refit the factors in turn; return the best set seen, so that rounding never makes it worse."""
    best = dict(factors)
    lowest = metric.loss(weight - build(best))
    current = dict(best)
    for _ in range(sweeps):
        for name in names:
            current[name] = refit(build, current, name, weight, metric, steps)
        loss = metric.loss(weight - build(current))
        if not loss < lowest * (1 - 1e-6):
            if loss < lowest:
                best = dict(current)
            break
        best, lowest = dict(current), loss
    return best
