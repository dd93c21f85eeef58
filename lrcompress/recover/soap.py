"""Adam in the eigenbasis of the gradients: SOAP.

What factors read has a few strong directions, and along them the loss is a hundred times steeper than along the others.
Adam scales coordinates, so it must take the pace of the steepest direction in all of them. Here every matrix is turned
into the basis in which its gradients do not correlate; there coordinates are what needs a pace of its own.

    G' = Lᵀ G R,   L, R eigenvectors of the running means of G Gᵀ and Gᵀ G;   Adam on G';   ΔW = L N' Rᵀ

A tensor of more axes is the matrix of its first one against the others; a side that is longer than `most` stays as it is.

Source: Vyas et al., arXiv 2409.11321, algorithm 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

#: Keys of a parameter's state: the running means and the bases of the two sides.
_SIDES = (("left_mean", "left"), ("right_mean", "right"))


class Soap(torch.optim.Optimizer):
    """`every`: steps between two looks at the basis. `most`: the longest side that is turned."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, *, betas: tuple[float, float] = (0.95, 0.95), eps: float = 1e-8,
        weight_decay: float = 0.0, every: int = 10, most: int = 512,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._every, self._most = every, most

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, p.grad, group)

    def _step(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        g = gradient.flatten(1) if gradient.dim() > 1 else gradient[:, None]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float64)
            state["mean"], state["square"] = torch.zeros_like(g), torch.zeros_like(g)
            self._begin(state, g)
        state["step"] += 1
        step = int(state["step"])
        state["mean"].lerp_(g, 1 - beta1)
        turned, mean = self._turn(state, g), self._turn(state, state["mean"])
        state["square"].mul_(beta2).addcmul_(turned, turned, value=1 - beta2)
        size = (state["square"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        change = self._back(state, mean / (1 - beta1**step) / size)
        if group["weight_decay"]:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(change.view_as(p), alpha=-group["lr"])
        self._look(state, g, beta2, refresh=step % self._every == 0)

    def _begin(self, state: dict[str, Tensor], g: Tensor) -> None:
        for (mean, basis), side in zip(_SIDES, (g, g.T), strict=True):
            if 1 < len(side) <= self._most:
                state[mean] = side @ side.T
                state[basis] = torch.linalg.eigh(state[mean].double())[1].flip(1).to(g.dtype)

    def _look(self, state: dict[str, Tensor], g: Tensor, beta: float, *, refresh: bool) -> None:
        for (mean, basis), side in zip(_SIDES, (g, g.T), strict=True):
            if mean in state:
                state[mean].lerp_(side @ side.T, 1 - beta)
                if refresh:  # one step of orthogonal iteration keeps the order of the directions
                    state[basis] = torch.linalg.qr(state[mean] @ state[basis])[0]

    @staticmethod
    def _turn(state: dict[str, Tensor], g: Tensor) -> Tensor:
        g = state["left"].T @ g if "left" in state else g
        return g @ state["right"] if "right" in state else g

    @staticmethod
    def _back(state: dict[str, Tensor], g: Tensor) -> Tensor:
        g = state["left"] @ g if "left" in state else g
        return g @ state["right"].T if "right" in state else g
