"""The architectures of the pretrained models beside the checkout, written from their `config.json`.

lrcompress factorize model.safetensors --arch tests/support/archs.py:mobilenet --input x:float32:batch,3,160,160
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _same(x: Tensor, stride: int) -> Tensor:
    """Pad a 3×3 convolution as TensorFlow does: one all around at stride 1, below and to the right at stride 2."""
    return F.pad(x, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))


class _Stage(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_out, 3, stride), nn.Conv2d(c_out, c_out, 3)
        self.bn1, self.bn2 = (nn.BatchNorm2d(c_out, eps=1e-3) for _ in range(2))
        self.stride = stride
        if stride == 2:
            self.shortcut = nn.Conv2d(c_in, c_out, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(_same(x, self.stride))))
        y = self.bn2(self.conv2(_same(y, 1)))
        return F.relu(y + (self.shortcut(x) if self.stride == 2 else x))


class ResNet8(nn.Module):
    """MLPerf Tiny's image classifier; x: (n, 3, 32, 32) in 0…255."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, eps=1e-3)
        self.layer1, self.layer2, self.layer3 = _Stage(16, 16, 1), _Stage(16, 32, 2), _Stage(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(_same(x, 1))))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class _Separable(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int, top: float | None) -> None:
        super().__init__()
        self.dw, self.pw = nn.Conv2d(c_in, c_in, 3, stride, groups=c_in), nn.Conv2d(c_in, c_out, 1)
        self.stride, self.top = stride, top

    def act(self, x: Tensor) -> Tensor:
        return F.relu(x) if self.top is None else x.clamp(0, self.top)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.pw(self.act(self.dw(_same(x, self.stride)))))


class MobileNet(nn.Module):
    """MobileNetV1 of half width; x: (n, 3, 160, 160) in −1…1."""

    def __init__(self) -> None:
        super().__init__()
        widths = [16, 32, 64, 64, 128, 128, 256, 256, 256, 256, 256, 256, 512, 512]
        strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1]
        self.stem = nn.Conv2d(3, 16, 3, 2)
        blocks = (_Separable(a, b, s, 6.0) for a, b, s in zip(widths, widths[1:], strides, strict=False))
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(512, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(_same(x, 2)).clamp(0, 6))
        return self.classifier(x.mean((2, 3)))


class TinyDarknet(nn.Module):
    """x: (n, 3, 224, 224) in 0…1."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 16, 32, 16, 128, 16, 128, 32, 256, 32, 256, 64, 512, 64, 512, 128, 1000]
        for i, (a, b) in enumerate(pairwise(widths), 1):
            size = 3 if i in (1, 2, 4, 6, 8, 10, 12, 14) else 1
            self.add_module(f"conv{i}", nn.Conv2d(a, b, size, padding=size // 2, bias=i == 16))
            if i < 16:
                self.add_module(f"bn{i}", nn.BatchNorm2d(b, eps=1e-3))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, 16):
            x = F.leaky_relu(self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(x)), 0.1)
            if i in (1, 2, 6, 10):
                x = F.max_pool2d(x, 2)
        return self.conv16(x).mean((2, 3))


class KeywordNet(nn.Module):
    """The depthwise-separable keyword spotter of MLPerf Tiny; x: (n, 1, 49, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 64, (10, 4), 2)
        self.blocks = nn.Sequential(*(_Separable(64, 64, 1, None) for _ in range(4)))
        self.classifier = nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(F.pad(x, (1, 1, 4, 5))))
        return self.classifier(self.blocks(x).mean((2, 3)))


class CharStep(nn.Module):
    """One character of the two-layer LSTM: ids (n,), h and c (n, 2, 128) → logits (n, 65) and the next h and c.

    A device keeps the state; the recurrence itself is no part of the graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(65, 128)
        self.cell0, self.cell1 = nn.Linear(256, 512), nn.Linear(256, 512)
        self.softmax = nn.Linear(128, 65)

    def forward(self, ids: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, hs, cs = self.embedding(ids), [], []
        for k, cell in enumerate((self.cell0, self.cell1)):
            i, j, f, o = cell(torch.cat([x, h[:, k]], 1)).chunk(4, 1)
            cs.append(c[:, k] * (f + 1).sigmoid() + i.sigmoid() * j.tanh())
            x = cs[-1].tanh() * o.sigmoid()
            hs.append(x)
        return self.softmax(x), torch.stack(hs, 1), torch.stack(cs, 1)


def resnet8() -> nn.Module:
    return ResNet8()


def mobilenet() -> nn.Module:
    return MobileNet()


def tiny_darknet() -> nn.Module:
    return TinyDarknet()


def kws_dscnn() -> nn.Module:
    return KeywordNet()


def char_step() -> nn.Module:
    return CharStep()
