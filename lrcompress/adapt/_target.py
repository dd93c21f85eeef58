"""What an adapter corrects: one weight, how its layer applies it, and where its factors have a core.

Every adapter works on the weight as it is stored, rows × columns × kernel: (out, in/groups, *k) of a convolution,
(in, out/groups, *k) of a transposed one, (out, in) of a linear layer, (tokens, width) of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from ..factorize import ConvGeometry
from ..factorize._linalg import convolve

KINDS = ("linear", "conv", "conv_transpose", "embedding")


#: Channels that a convolution's kernels take at a time on a CPU with 512-bit vectors: fewer cost as much.
_BLOCK = 16


def blocked(channels: int) -> int:
    """Return the channels that a convolution pays for."""
    return -(-channels // _BLOCK) * _BLOCK


class Base(Protocol):
    """A layer as an adapter sees it: the weight that its factors stand for, and the factors."""

    form: str
    shape: tuple[int, ...]

    @property
    def weight(self) -> Tensor: ...

    @property
    def factors(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Target:
    """A layer that takes adapters; `shape` is its weight's, `core` the size of the core between its factors (0: none)."""

    shape: tuple[int, ...]
    kind: str = "linear"
    geometry: ConvGeometry | None = None
    groups: int = 1
    output_padding: tuple[int, ...] = ()
    core: int = 0

    @property
    def output_axis(self) -> int:
        """The axis of the weight along which outputs lie."""
        return 1 if self.kind in ("embedding", "conv_transpose") else 0

    def positions(self, x: Tensor) -> int:
        """Return at how many places the weight is applied to x, a stride left out."""
        return (
            x.numel()
            if self.kind == "embedding"
            else x.numel() // (x.shape[-1] if self.kind == "linear" else x.shape[1])
        )

    def apply(self, x: Tensor, weight: Tensor, groups: int | None = None, bias: Tensor | None = None) -> Tensor:
        """Return what the layer does with `weight` instead of its own: x (…, in), (batch, in, *space) or ids."""
        groups = self.groups if groups is None else groups
        if self.kind == "embedding":
            rows = F.embedding(x, weight)
            return rows if bias is None else rows + bias
        if self.kind == "linear":
            return F.linear(x, weight, bias)
        assert self.geometry is not None
        if self.kind == "conv":
            return convolve(x, weight, self.geometry, groups, bias)
        call = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[weight.dim() - 2]
        walk = self.geometry
        return call(x, weight, bias, walk.stride, walk.padding, self.output_padding, groups, walk.dilation)

    def as_dict(self) -> dict[str, Any]:
        """Return what a file keeps of a target: enough to know an adapter's tensors, not to run the layer."""
        return {"shape": list(self.shape), "kind": self.kind, "groups": self.groups, "core": self.core}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Target:
        """Read what `as_dict` wrote; `ValueError` for anything else."""
        shape, kind, numbers = value.get("shape"), value.get("kind"), (value.get("groups"), value.get("core"))
        if not isinstance(shape, list) or not all(type(d) is int and d > 0 for d in shape) or len(shape) < 2:
            raise ValueError(f"expected a shape, got {shape}")
        if kind not in KINDS or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"expected a kind of {', '.join(KINDS)} with groups and core, got {value}")
        return cls(tuple(shape), kind, groups=value["groups"] or 1, core=value["core"])
