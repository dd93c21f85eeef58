"""Handwritten digits: a small convolutional network, its training, and 1,797 real images that scikit-learn ships.

The images are split once, by a fixed shuffle: 997 to train on, 200 to decide on, 600 that nobody trains on.
`shift` changes the world the images come from: a camera that is mounted at an angle, or a noisy sensor.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEST, SELECT = 600, 200


class DigitsNet(nn.Module):
    """8×8 grey images → 10 scores: three convolutions and two linear layers, 226,570 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 128, 3, padding=1)
        self.fc1 = nn.Linear(512, 256)
        self.fc2 = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, 1, 8, 8) in 0…1 → scores (batch, 10)."""
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def digits_net() -> nn.Module:
    """Build the network with random weights."""
    return DigitsNet()


def digits(
    split: str, shift: str | None = None, amount: float = 0.0, seed: int = 0, both: bool = False
) -> dict[str, np.ndarray]:
    """Return x (n, 1, 8, 8) float32 in 0…1 and y (n,) of `split`: train, select or test.

    `shift`: "rotate" by `amount` degrees, or "noise" of standard deviation `amount`, clipped to 0…1. `both`: the
    unshifted images too, so that what is learnt for the changed world does not forget the old one.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    x = (found.images / 16).astype(np.float32)[:, None]
    order = np.random.RandomState(20240601).permutation(len(x))
    parts = {"test": order[:TEST], "select": order[TEST : TEST + SELECT], "train": order[TEST + SELECT :]}
    if split not in parts:
        raise ValueError(f"split is one of {', '.join(parts)}, not {split!r}")
    chosen = parts[split]
    plain, y = x[chosen], found.target[chosen].astype(np.int64)
    x = plain
    if shift == "rotate":
        from scipy.ndimage import rotate

        x = rotate(x, amount, axes=(3, 2), reshape=False, order=1)
    elif shift == "noise":
        offset = list(parts).index(split)
        x = x + np.random.RandomState(1000 * seed + offset).normal(0, amount, x.shape)
    elif shift is not None:
        raise ValueError(f"shift is rotate or noise, not {shift!r}")
    if both:
        x, y = np.concatenate([x, plain]), np.concatenate([y, y])
    return {"x": np.clip(x, 0, 1).astype(np.float32), "y": y}


def train(*, seed: int, advance: Callable[..., None], steps: int = 400, batch_size: int = 64) -> nn.Module:
    """Train the network on the split `train`; the same seed and thread count give the same bits."""
    torch.manual_seed(seed)
    network = digits_net().train()
    samples = digits("train")
    x, y = torch.from_numpy(samples["x"]), torch.from_numpy(samples["y"])
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(x), (batch_size,), generator=generator)
        loss = F.cross_entropy(network(x[chosen]), y[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        advance(1, f"loss {loss.item():.3f}")
    return network.eval()
