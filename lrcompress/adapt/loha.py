"""LoHa: ΔW = s·(B₁A₁) ∘ (B₂A₂), rank up to r² from 2r(rows + columns·kernel) numbers.

For runtimes that only know LoRA it expands exactly to rank r² by (B₁A₁)∘(B₂A₂) = (B₁ • B₂)(A₁ ⊙ A₂), rows of the
left and columns of the right being Kronecker products; the forward pass of a linear layer goes that way where r² is
small. With cores t₁, t₂ (r, r, *k) the convolution's factors are tᵢ ×₀ wᵢₐ ×₁ wᵢᵦ (the Tucker variant).

Source: Hyeon-Woo et al., arXiv 2108.06098 (FedPara).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._adding import added
from ._base import BaseAdapter
from ._target import Base, Target


class Adapter(BaseAdapter):
    """B₂ (w2_a) is zero at init, the others Gaussian."""

    hada_w1_a: nn.Parameter
    hada_w1_b: nn.Parameter
    hada_w2_a: nn.Parameter
    hada_w2_b: nn.Parameter
    hada_t1: nn.Parameter
    hada_t2: nn.Parameter

    kind = "loha"
    tensor_names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")

    def fresh(self, generator: torch.Generator | None, *, tucker: bool = False) -> dict[str, Tensor]:
        rows, n = self.sides
        r, (_, columns, *kernel) = self.rank, self.weight_shape

        def normal(*shape: int, std: float) -> Tensor:
            return torch.empty(*shape).normal_(0, std, generator=generator)

        if tucker and math.prod(kernel) > 1:
            t_std = 1 / math.sqrt(r * math.prod(kernel))
            return {
                "hada_w1_a": normal(r, rows, std=0.1), "hada_w1_b": normal(r, columns, std=1.0),
                "hada_w2_a": torch.zeros(r, rows), "hada_w2_b": normal(r, columns, std=1 / math.sqrt(columns)),
                "hada_t1": normal(r, r, *kernel, std=1.0), "hada_t2": normal(r, r, *kernel, std=t_std),
            }  # fmt: skip
        # A₂ small as LoRA's A is, so that one step moves the outputs by an amount that does not depend on the width.
        return {
            "hada_w1_a": normal(rows, r, std=0.1), "hada_w1_b": normal(r, n, std=1.0),
            "hada_w2_a": torch.zeros(rows, r), "hada_w2_b": normal(r, n, std=1 / math.sqrt(n)),
        }  # fmt: skip

    def shapes(self, given: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        rows, n = self.sides
        r, (_, columns, *kernel) = self.rank, self.weight_shape
        if "hada_t1" in given or "hada_t2" in given:
            pair, core = ((r, rows), (r, columns)), (r, r, *kernel)
            return {f"hada_w{i}_{ab}": s for i in (1, 2) for ab, s in zip("ab", pair, strict=True)} | {
                "hada_t1": core, "hada_t2": core,
            }  # fmt: skip
        flat = ((rows, r), (r, n))
        return {f"hada_w{i}_{ab}": s for i in (1, 2) for ab, s in zip("ab", flat, strict=True)}

    def pairs(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return (B₁, A₁) and (B₂, A₂): B (rows, r), A (r, columns·kernel), cores multiplied in, scaling left out."""
        flat = ((self.hada_w1_a, self.hada_w1_b), (self.hada_w2_a, self.hada_w2_b))
        if self._parameters.get("hada_t1") is None:
            return flat
        cores = (self.hada_t1, self.hada_t2)
        (b1, a1), (b2, a2) = (
            (b.T, torch.einsum("ij...,jr->ir...", t, a).flatten(1)) for (b, a), t in zip(flat, cores, strict=True)
        )
        return (b1, a1), (b2, a2)

    def plain_delta(self, base: Base | None = None) -> Tensor:
        (b1, a1), (b2, a2) = self.pairs()
        return (self.scaling * ((b1 @ a1) * (b2 @ a2))).reshape(self.weight_shape)

    def expand(self, base: Base | None = None) -> tuple[Tensor, Tensor]:
        (b1, a1), (b2, a2) = self.pairs()
        b = torch.einsum("or,os->ors", b1, b2).flatten(1)
        a = torch.einsum("rn,sn->rsn", a1, a2).flatten(0, 1)
        return a.reshape(-1, *self.weight_shape[1:]), self.scaling * b

    def forward(self, x: Tensor, target: Target) -> Tensor:
        rows, n = self.sides
        if target.kind == "embedding":
            (b1, a1), (b2, a2) = self.pairs()
            return self.scaling * ((F.embedding(x, b1) @ a1) * (F.embedding(x, b2) @ a2))
        if target.kind == "linear" and self.n_macs(target) < rows * n:
            a, b = self.expand()
            return F.linear(F.linear(x, a), b)
        return target.apply(x, self.plain_delta())

    def n_macs(self, target: Target) -> int:
        dense = math.prod(self.weight_shape)
        return self.rank**2 * sum(self.sides) if target.kind == "linear" else dense

    def summed(self, weight: Tensor, share: float) -> Tensor:
        (b1, a1), (b2, a2) = self.pairs()
        if a1.dtype != weight.dtype:
            return super().summed(weight, share)
        total: Tensor = _Summed.apply(weight.flatten(1), b1, a1, b2, a2, share * self.scaling)  # type: ignore[no-untyped-call]
        return total.reshape(weight.shape)

    def add_to(self, y: Tensor, x: Tensor, target: Target, share: float) -> Tensor:
        if target.kind != "linear":
            return super().add_to(y, x, target, share)
        a, b = self.expand()
        return added(y, F.linear(x, a), b, share, channels_first=False)


class _Summed(torch.autograd.Function):
    """W + s·(B₁A₁) ∘ (B₂A₂); of the two products nothing is kept, the gradient multiplies them again."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(b1, a1, b2, a2)
        ctx.scale = scale
        return torch.addcmul(weight, b1 @ a1, b2 @ a2, value=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (b1, a1, b2, a2), needed = gradients, ctx.saved_tensors, ctx.needs_input_grad
        found: list[Tensor | None] = [g if needed[0] else None]
        for (b, a), (c, d), wanted in (((b1, a1), (b2, a2), needed[1:3]), ((b2, a2), (b1, a1), needed[3:5])):
            if not any(wanted):
                found += [None, None]
                continue
            through = (c @ d) * g  # d(scale·P∘Q)/dP, scale left to the small products
            found += [ctx.scale * (through @ a.T), ctx.scale * (b.T @ through)]
        return (*found, None)
