"""LoRA: ΔW = s·B A with A (r, columns, *k) and B (rows, r); on a convolution A walks like the layer and B is 1×1.

On a grouped convolution a rank that the groups divide gives every group its own r/groups filters, ΔW_γ = B_γ A_γ with
B (rows, r/groups): a grouped pair of layers. Any other rank shares A's filters among the groups, B (rows, r). A
middle tensor `lora_mid` (r, r, *k) makes A pointwise (LyCORIS's Tucker variant): ΔW = mid ×₀ B ×₁ A.

Source: Hu et al., arXiv 2106.09685.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..factorize import ConvGeometry
from ..factorize._linalg import convolve, pointwise
from ._adding import added
from ._base import BaseAdapter
from ._target import Base, Target, blocked


class Adapter(BaseAdapter):
    """B is zero at init, A uniform within ±1/√(columns·kernel)."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_mid: nn.Parameter

    kind = "lora"
    tensor_names = ("lora_A", "lora_B", "lora_mid")

    def fresh(self, generator: torch.Generator | None, *, tucker: bool = False) -> dict[str, Tensor]:
        rows, n = self.sides
        r, (_, columns, *kernel) = self.rank, self.weight_shape
        tucker = tucker and math.prod(kernel) > 1
        a_shape = (r, columns, *(1,) * len(kernel)) if tucker else (r, *self.weight_shape[1:])
        bound = 1 / math.sqrt(columns if tucker else n)
        found = {"lora_A": torch.empty(a_shape).uniform_(-bound, bound, generator=generator)}
        found["lora_B"] = torch.zeros(rows, r if tucker else self._own_rank, *(1,) * len(kernel))
        if tucker:
            std = 1 / math.sqrt(r * math.prod(kernel))
            found["lora_mid"] = torch.empty(r, r, *kernel).normal_(0, std, generator=generator)
        return found

    @property
    def _own_rank(self) -> int:
        """Columns of B: the rank of one group where it has filters of its own."""
        return self.rank // self.groups if self.groups > 1 and self.rank % self.groups == 0 else self.rank

    def shapes(self, given: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        r, (rows, columns, *kernel) = self.rank, self.weight_shape
        ones = (1,) * len(kernel)
        own = given.get("lora_B", (0, r))[1:2] == (self._own_rank,)
        found: dict[str, tuple[int, ...]] = {
            "lora_A": (r, columns, *kernel),
            "lora_B": (rows, self._own_rank if own else r, *ones),
        }
        if "lora_mid" in given:
            found |= {"lora_A": (r, columns, *ones), "lora_mid": (r, r, *kernel), "lora_B": (rows, r, *ones)}
        return found

    def filters(self) -> Tensor:
        """Return A (r, columns, *k), the middle tensor multiplied in."""
        mid = self._parameters.get("lora_mid")
        return self.lora_A if mid is None else torch.einsum("mn...,nj->mj...", mid, self.lora_A.flatten(1))

    def _by_group(self) -> tuple[Tensor, Tensor]:
        """Return A (groups, ρ, columns·kernel) and B (groups, rows/groups, ρ); shared filters are only seen, not copied."""
        a, b = self.filters().flatten(1), self.lora_B.flatten(1)
        b = b.reshape(self.groups, -1, b.shape[1])
        if b.shape[2] == self.rank:
            return a.expand(self.groups, *a.shape), b
        return a.reshape(self.groups, -1, a.shape[1]), b

    def plain_delta(self, base: Base | None = None) -> Tensor:
        a, b = self._by_group()
        return (self.scaling * b @ a).reshape(self.weight_shape)

    def expand(self, base: Base | None = None) -> tuple[Tensor, Tensor]:
        b = self.scaling * self.lora_B.flatten(1)
        if b.shape[1] != self.rank:
            b = torch.block_diag(*b.reshape(self.groups, -1, b.shape[1]))  # type: ignore[no-untyped-call]
        return self.filters(), b

    def forward(self, x: Tensor, target: Target) -> Tensor:
        s = self.scaling
        if target.kind == "linear":
            return F.linear(F.linear(x, self.lora_A), s * self.lora_B)
        if target.kind == "embedding":
            return F.embedding(x, self.lora_B) @ (s * self.lora_A)
        if target.kind == "conv" and target.groups == 1 and "lora_mid" in self._parameters:
            assert target.geometry is not None
            inner = convolve(pointwise(x, self.lora_A.flatten(1)), self.lora_mid, target.geometry)
            return pointwise(inner, s * self.lora_B.flatten(1))
        a, b = self._by_group()
        g, spatial = target.groups, x.dim() - 2
        kernels, once = a.reshape(-1, *self.weight_shape[1:]), ConvGeometry.default(spatial)
        if target.kind == "conv":
            mixed = (s * b).reshape(-1, b.shape[2], *(1,) * spatial)
            return convolve(target.apply(x, kernels, g), mixed, once, g)
        turned = (s * b).transpose(1, 2).reshape(-1, b.shape[1], *(1,) * spatial)
        return target.apply(convolve(x, turned, once, g), kernels, g)

    def n_macs(self, target: Target) -> int:
        rows, n = self.sides
        kernel = math.prod(self.weight_shape[2:])
        if "lora_mid" in self._parameters:
            return self.rank * (self.weight_shape[1] + self.rank * kernel + rows)
        inner = self.lora_B.shape[1]
        if target.kind == "conv":
            return target.groups * blocked(inner) * n + inner * rows
        return inner * (target.groups * n + rows)

    def summed(self, weight: Tensor, share: float) -> Tensor:
        a, b = self._by_group()
        if a.dtype != weight.dtype:
            return super().summed(weight, share)
        groups = weight.reshape(self.groups, -1, a.shape[2])
        return torch.baddbmm(groups, b, a, alpha=share * self.scaling).reshape(weight.shape)

    def add_to(self, y: Tensor, x: Tensor, target: Target, share: float) -> Tensor:
        scale = share * self.scaling
        if target.kind == "linear":
            return added(y, F.linear(x, self.lora_A), self.lora_B, scale, channels_first=False)
        if target.kind == "conv" and target.groups == 1 and "lora_mid" not in self._parameters:
            inner = target.apply(x, self.lora_A)
            return added(y, inner, self.lora_B.flatten(1), scale, channels_first=True)
        return super().add_to(y, x, target, share)

    @property
    def random_side(self) -> nn.Parameter | None:
        return self.lora_A if self.groups == 1 and "lora_mid" not in self._parameters else None
