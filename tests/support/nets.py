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


class Grouped(nn.Module):
    """A grouped, a depthwise and a dilated convolution on (batch, 8, 9, 9)."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(8, 24, 3, padding=1, groups=2)
        self.deep = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.far, self.fc = nn.Conv2d(24, 16, 3, padding=2, dilation=2), nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.deep(F.relu(self.wide(x))))
        return self.fc(F.relu(self.far(x)).mean((2, 3)))


def grouped() -> Grouped:
    torch.manual_seed(0)
    return Grouped().eval()


class Attending(nn.Module):
    """Three projections of one input, as attention has them, on (batch, 6, 24)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(24, n) for n in (24, 24, 16))
        self.out = nn.Linear(16, 5)

    def forward(self, x):
        weights = (self.q(x) @ self.k(x).transpose(1, 2) / 24**0.5).softmax(-1)
        return self.out((weights @ self.v(x)).mean(1))


def attending() -> Attending:
    torch.manual_seed(0)
    return Attending().eval()
