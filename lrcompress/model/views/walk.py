"""How a convolution reads its input: geometry alone, whatever the network is stored as."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Walk:
    """Kernel, stride and dilation per spatial axis, and what is padded before and after each.

    `auto`: "upper" or "lower" pads as much as keeps ⌈size / stride⌉ positions (the odd one after, or before), and
    `pads` is not read. `mode`: what is padded, as torch calls it.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[tuple[int, int], ...] = ()
    auto: str = ""
    mode: str = "zeros"
    groups: int = 1

    def around(self, size: Sequence[int]) -> list[tuple[int, int]]:
        """Return (before, after) for an input of this size."""
        if not self.auto:
            return list(self.pads)
        found = []
        for n, k, s, d in zip(size, self.kernel, self.stride, self.dilation, strict=True):
            total = max((math.ceil(n / s) - 1) * s + d * (k - 1) + 1 - n, 0)
            less, more = total // 2, total - total // 2
            found.append((less, more) if self.auto == "upper" else (more, less))
        return found


def walks_of(network: nn.Module, names: Iterable[str]) -> dict[str, Walk]:
    """Return how each convolution among the named modules walks."""
    found = {name: network.get_submodule(name) for name in names}
    return {name: walk_of(m) for name, m in found.items() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)}


def walk_of(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Walk:
    """Return how a convolution module walks."""
    kernel, stride, dilation = tuple(layer.kernel_size), tuple(layer.stride), tuple(layer.dilation)
    if layer.padding == "same":
        return Walk(kernel, stride, dilation, auto="upper", mode=layer.padding_mode, groups=layer.groups)
    around = (0,) * len(kernel) if isinstance(layer.padding, str) else layer.padding
    pads = tuple((int(p), int(p)) for p in around)
    return Walk(kernel, stride, dilation, pads, mode=layer.padding_mode, groups=layer.groups)


def padded(x: Tensor, walk: Walk) -> Tensor:
    """Return x (batch, in, *space) with what the convolution pads around it."""
    around = walk.around(x.shape[2:])
    if not any(a or b for a, b in around):
        return x
    flat = [n for pair in reversed(around) for n in pair]
    return F.pad(x, flat, mode="constant" if walk.mode == "zeros" else walk.mode)


def patches(x: Tensor, walk: Walk) -> Tensor:
    """Return the patches (positions, in·kernel) of x (batch, in, *space), ordered (channel, *kernel), padding included."""
    x = padded(x, walk)
    for axis, (k, d, s) in enumerate(zip(walk.kernel, walk.dilation, walk.stride, strict=True)):
        # Positions of a dilated window stay on the axis; what it covers is appended as the last one.
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    axes = len(walk.kernel)
    x = x.movedim(1, 1 + axes)  # (batch, *positions, channel, *kernel)
    return x.reshape(-1, x.shape[1 + axes] * math.prod(walk.kernel))
