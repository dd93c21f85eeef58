"""A transposed convolution that takes adapters: always dense, its weight stored (in, out/groups, *k)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt import Target
from ..factorize import ConvGeometry
from .layers import FactorizedLayer, _filled

CLASSES: dict[int, type[nn.Module]] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class DenseConvTranspose(FactorizedLayer):
    """y = convᵀ(x) + b with a place for adapters; `forward` takes `output_size` as torch's layers do."""

    layer_kind = "conv_transpose"

    def __init__(
        self, *args: Any, geometry: ConvGeometry, groups: int = 1, output_padding: tuple[int, ...] = ()
    ) -> None:
        super().__init__(*args)
        self.geometry, self.groups, self.output_padding = geometry, groups, output_padding

    @property
    def target(self) -> Target:
        return Target(self.shape, "conv_transpose", self.geometry, self.groups, self.output_padding)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        if output_size is not None:
            raise ValueError("output_size: expected none, a layer that takes adapters has a fixed output_padding")
        return self._output(x)

    def _through(self, x: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
        return self.target.apply(x, factors["weight"])

    def to_plain(self) -> nn.Module:
        inner, out, *kernel = self.shape
        walk = self.geometry
        plain = CLASSES[len(kernel)](
            inner, out * self.groups, tuple(kernel), walk.stride, walk.padding, self.output_padding, self.groups,
            self.bias is not None, walk.dilation,
        )  # fmt: skip
        return _filled(plain, self.merged_weight().detach(), self.bias)


def wrapped(old: nn.Module, weight: nn.Parameter, bias: Tensor | None) -> DenseConvTranspose:
    """Return `old` (a ConvTranspose1d/2d/3d) with a place for adapters, around the same parameters."""
    assert isinstance(old, torch.nn.modules.conv._ConvTransposeNd)
    assert not isinstance(old.padding, str)
    geometry = ConvGeometry(tuple(old.stride), tuple(old.padding), tuple(old.dilation))
    return DenseConvTranspose(
        "dense", {"weight": weight}, tuple(weight.shape), 0, bias,
        geometry=geometry, groups=old.groups, output_padding=tuple(old.output_padding),
    )  # fmt: skip
