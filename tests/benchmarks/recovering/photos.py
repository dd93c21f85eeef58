"""MobileNetV1 (0.5, 160 pixels), the photos that it knows, CIFAR-10's classes as its task, and those images at dusk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcompress.data import Data

from . import heads

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

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = _Same(3, 16, 2)
        self.blocks = nn.ModuleList(_Block(a, b, s) for a, b, s in zip(_WIDTHS, _WIDTHS[1:], STRIDES, strict=False))
        self.classifier = nn.Linear(512, classes)

    def embed(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.embed(x))  # type: ignore[no-any-return]


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


def things() -> nn.Module:
    """Return the network for ten classes without its weights."""
    return MobileNet(10)


def small_photos(x: np.ndarray, y: np.ndarray, *, dusk: int | None = None, size: int = 96) -> Data:
    """Return CIFAR-10's images, enlarged, with their classes; with a seed `dusk` dark, of little contrast and with some noise."""
    images = torch.as_tensor(x).permute(0, 3, 1, 2).float() / 127.5 - 1
    larger = F.interpolate(images, (size, size), mode="bilinear").numpy()
    if dusk is not None:
        noise = np.random.RandomState(dusk).normal(0, 0.05, larger.shape).astype(np.float32)
        larger = np.clip(larger * np.float32(0.4) - np.float32(0.3) + noise, -1, 1)
    return Data.of_arrays({"x": larger}, y.astype(np.int64))


def trained(weights: dict[str, Tensor], known: Data) -> MobileNet:
    """Return the network with these weights and a head for ten classes, fitted to what it sees in `known`."""
    torch.manual_seed(0)
    net = MobileNet(10).eval()
    net.load_state_dict({k: v for k, v in weights.items() if not k.startswith("classifier")}, strict=False)
    with torch.no_grad():
        x = torch.cat([net.embed(torch.as_tensor(b.inputs["x"])) for b in known.batches(100)])
    heads.fit(net.classifier, x, torch.as_tensor(np.asarray(known.labels)))
    return net


if __name__ == "__main__":  # what the assets' README states: 70.2 % of 500
    from safetensors.torch import load_file

    from tests.benchmarks.recovering.adaptation import ASSETS

    net = mobilenet().eval()
    net.load_state_dict(load_file(ASSETS / "models" / "mobilenet_v1_0.5_160" / "model.safetensors"))
    x, y = photos(ASSETS / "data" / "imagenet_sample_a")
    with torch.no_grad():
        said = torch.cat([net(torch.as_tensor(x[i : i + 50])).argmax(1) for i in range(0, len(x), 50)])
    print(float((said.numpy() == y).mean()), len(y))
