"""One network with every layer type that foreign adapter packages know, each layer on an input of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Layers(nn.Module):
    """Every layer reads `x`, random numbers, as its own input; the outputs are by layer, so none hides another."""

    SHAPES = {
        "linear": (3, 24), "blocks.0.fc": (2, 5, 16), "narrow": (4, 12), "conv1d": (2, 8, 11), "conv2d": (2, 8, 9, 9),
        "point": (2, 12, 4, 4), "conv3d": (1, 4, 4, 5, 5), "strided": (2, 8, 9, 8), "grouped": (2, 8, 7, 7),
        "depthwise": (2, 8, 6, 6), "dilated": (2, 8, 9, 9), "reflect": (2, 8, 7, 7),
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.narrow = nn.Linear(24, 36), nn.Linear(12, 7, bias=False)
        self.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(16, 20)})])
        self.conv1d, self.conv2d = nn.Conv1d(8, 12, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.point, self.conv3d = nn.Conv2d(12, 8, 1), nn.Conv3d(4, 6, 3, padding=1)
        self.strided = nn.Conv2d(8, 16, (3, 5), stride=(2, 1), padding=(0, 2), bias=False)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.dilated = nn.Conv2d(8, 12, 3, dilation=2, padding=2)
        self.reflect = nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect")
        self.embed = nn.Embedding(30, 12)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.get_submodule(name)(value) for name, value in x.items()}


def layers(seed: int = 0) -> Layers:
    torch.manual_seed(seed)
    return Layers().eval()


def inputs(names: list[str]) -> dict[str, Tensor]:
    """Return seeded inputs of the layers called `names`."""
    g = torch.Generator().manual_seed(5)
    found = {n: torch.randn(s, generator=g) for n, s in Layers.SHAPES.items()}
    found["embed"] = torch.randint(0, 30, (2, 4), generator=g)
    return {n: found[n] for n in names}


def randomized(module: nn.Module, names: str = "") -> None:
    """Fill the parameters whose name holds `names` with seeded random numbers of a modest size."""
    g = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if names in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)
