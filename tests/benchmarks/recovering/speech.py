"""A small network for spoken digits, trained here: three voices known, a fourth kept apart."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.signal import stft
from torch import Tensor, nn

from lrcompress.data import Data

RATE_HZ, WINDOW = 8000, 256
BANDS, FRAMES = 32, 48


class DigitNet(nn.Module):
    """Four convolutions over (batch, 1, BANDS, FRAMES), mean over time, ten digits."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        sizes = (1, width, width, 2 * width, 2 * width)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=1 + k % 2, padding=1) for k, (a, b) in enumerate(pairwise(sizes))
        )
        self.fc1, self.fc2 = nn.Linear(2 * width * BANDS // 4, 96), nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.relu(conv(x))
        return self.fc2(torch.relu(self.fc1(x.mean(-1).flatten(1))))  # type: ignore[no-any-return]


def digit_net() -> DigitNet:
    """Return the network without its weights."""
    return DigitNet()


def voices(path: Path, *, apart: str) -> tuple[Data, Data]:
    """Return the clips of all other voices, and those of `apart`: log-mel pictures with their digits."""
    found = np.load(path, allow_pickle=False)
    keys = {k.lower(): k for k in found.files}
    clips = found[keys.get("x", keys.get("audio", found.files[0]))].astype(np.float32) / 32768
    digits = found[keys.get("digit", keys.get("y", ""))].astype(np.int64)
    speakers = np.array([str(s) for s in found[keys["speaker"]]])
    pictures = np.stack([log_mel(c) for c in clips])[:, None]
    own = speakers == apart
    return tuple(Data.of_arrays({"x": pictures[m]}, digits[m]) for m in (~own, own))  # type: ignore[return-value]


def log_mel(clip: np.ndarray) -> np.ndarray:
    """Return a clip (samples,) as a picture (BANDS, FRAMES), its mean and deviation taken out."""
    _, _, z = stft(clip, RATE_HZ, nperseg=WINDOW, noverlap=WINDOW // 3, boundary=None)
    mel = np.log(_filters() @ (np.abs(z) ** 2) + 1e-8)[:, :FRAMES]
    mel = np.pad(mel, ((0, 0), (0, FRAMES - mel.shape[1])), constant_values=mel.min())
    out: np.ndarray = ((mel - mel.mean()) / (mel.std() + 1e-6)).astype(np.float32)
    return out


def _filters() -> np.ndarray:
    """Return triangles (BANDS, bins), evenly spaced in mel."""
    mels = np.linspace(0, 2595 * np.log10(1 + RATE_HZ / 2 / 700), BANDS + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    bins = np.linspace(0, RATE_HZ / 2, WINDOW // 2 + 1)
    up = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    found: np.ndarray = np.maximum(0, np.minimum(up, down))
    return found


def trained(data: Data, *, epochs: int = 12, seed: int = 0) -> DigitNet:
    """Return the network trained on `data`."""
    torch.manual_seed(seed)
    net = DigitNet()
    steps = epochs * (len(data) // 64)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for epoch in range(epochs):
        order = np.random.RandomState(epoch).permutation(len(data))
        for k in range(len(data) // 64):
            batch = next(iter(data.take(order[64 * k : 64 * k + 64]).batches(64)))
            loss = F.cross_entropy(net(torch.as_tensor(batch.inputs["x"])), torch.as_tensor(batch.labels))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return net.eval()
