"""Small residual networks with batch normalization, as architectures that a checkpoint can name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """x (n, 3, 8, 8) → logits (n, 5): one block whose shortcut is there first, one whose shortcut comes later."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv3, self.bn3 = nn.Conv2d(12, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.down, self.bn4 = nn.Conv2d(12, 16, 1, stride=2, bias=False), nn.BatchNorm2d(16)
        self.linear = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        y += x
        y = F.relu_(y)
        z = self.bn3(self.conv3(y))
        z = F.relu(z + self.bn4(self.down(y)))
        return self.linear(z.mean((2, 3)))


def residual(seed: int = 0) -> Residual:
    """Return the network with weights and running statistics that follow from `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    net = Residual()
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                fan_in = value[0].numel() if value.dim() > 1 else 1
                value.copy_(
                    1 + 0.3 * noise.abs()
                    if name.endswith("var")
                    else noise * (2 / fan_in) ** 0.5 * (1 if value.dim() > 1 else 0.3)
                )
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.add_(1.0)
    return net.eval()
