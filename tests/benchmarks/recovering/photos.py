"""MobileNetV1 (0.5, 160 pixels) and photos of low contrast: the network, the images, and how they are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE, STRIDES = 160, (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
_WIDTHS = (16, 32, 64, 64, 128, 128, 256, 256, 256, 256, 256, 256, 512, 512)


class _Same(nn.Conv2d):
    """A 3×3 convolution with TensorFlow's padding: with stride 2, right and bottom only."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int = 1) -> None:
        super().__init__(inputs, outputs, 3, stride, padding=1 if stride == 1 else 0, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1)) if self.stride[0] == 2 else x)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.dw, self.pw = _Same(inputs, inputs, stride, inputs), nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.pw(F.relu6(self.dw(x))))


class MobileNet(nn.Module):
    """The network of the assets, batch normalization folded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Same(3, 16, 2)
        self.blocks = nn.ModuleList(_Block(a, b, s) for a, b, s in zip(_WIDTHS, _WIDTHS[1:], STRIDES, strict=False))
        self.classifier = nn.Linear(512, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.mean((2, 3)))


def mobilenet() -> nn.Module:
    """Return the network without its weights."""
    return MobileNet()


def photos(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images (n, 3, 160, 160) in −1…1 and their classes."""
    from PIL import Image

    images, classes = [], []
    for line in (folder / "labels.tsv").read_text().splitlines():
        name, label = line.split("\t")[:2]
        if not label.isdecimal():
            continue
        image = Image.open(folder / name).convert("RGB")
        scale = 183 / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - SIZE) // 2, (image.height - SIZE) // 2
        pixels = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)), np.float32)
        images.append((pixels / 127.5 - 1).transpose(2, 0, 1))
        classes.append(int(label))
    return np.stack(images), np.array(classes, np.int64)


def moved(images: np.ndarray, seed: int, contrast: float = 0.4, sigma: float = 0.05) -> np.ndarray:
    """Return the images with little contrast and some noise, as a cheap camera at dusk takes them."""
    noise = np.random.RandomState(seed).normal(0, sigma, images.shape).astype(np.float32)
    return np.clip(images * contrast - 0.3 + noise, -1, 1).astype(np.float32)


if __name__ == "__main__":  # what the assets' README states: 70.2 % of 500
    from safetensors.torch import load_file

    from tests.benchmarks.recovering.adaptation import ASSETS

    net = mobilenet().eval()
    net.load_state_dict(load_file(ASSETS / "models" / "mobilenet_v1_0.5_160" / "model.safetensors"))
    x, y = photos(ASSETS / "data" / "imagenet_sample_a")
    with torch.no_grad():
        for name, pixels in (("as they are", x), ("moved", moved(x, 0))):
            said = torch.cat([net(torch.as_tensor(pixels[i : i + 50])).argmax(1) for i in range(0, len(x), 50)])
            print(name, float((said.numpy() == y).mean()), len(y))
