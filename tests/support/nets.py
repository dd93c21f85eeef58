"""Two-layer networks with every kind of layer that the pipeline meets; also named by --arch in tests."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Small(nn.Module):
    """A convolution, a 1×1, a normalisation and two linear layers on (batch, 3, 8, 8)."""

    def __init__(self, width: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.mix = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.Conv2d(2 * width, width, 1)
        self.fc1, self.fc2 = nn.Linear(width * 16, 32), nn.Linear(32, classes)

    def forward(self, x):
        x = F.relu(self.bn(self.conv1(x)), inplace=True)
        x = F.relu(self.mix(F.relu(self.conv2(x))))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Words(nn.Module):
    """An embedding and a linear layer over (batch, sequence) ids with a mask."""

    def __init__(self, rows: int = 40, width: int = 24) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(rows, width), nn.Linear(width, 6)

    def forward(self, ids, attention_mask):
        mask = attention_mask[..., None].to(torch.float32)
        return self.fc((self.embed(ids) * mask).sum(1) / mask.sum(1).clamp_min(1))


def small(width: int = 16, classes: int = 5) -> Small:
    """Return a seeded `Small`: low-rank enough that compression means something."""
    torch.manual_seed(0)
    net = Small(width, classes).eval()
    with torch.no_grad():
        net.bn.running_mean.uniform_(-0.2, 0.2)
        net.bn.running_var.uniform_(0.5, 1.5)
        for layer in (net.conv1, net.conv2, net.mix, net.fc1, net.fc2):
            layer.weight.mul_(2.5)  # answers of order one, as trained networks give
    return net


def words() -> Words:
    torch.manual_seed(0)
    return Words().eval()


def images(n: int = 200, seed: int = 0, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Return images (n, 3, 8, 8) whose class is a direction that `small` can learn, and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    means = np.random.default_rng(99).standard_normal((classes, 3, 8, 8))
    return (means[labels] + rng.standard_normal((n, 3, 8, 8))).astype(np.float32), labels.astype(np.int64)
