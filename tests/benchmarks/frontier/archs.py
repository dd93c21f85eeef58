"""The convolutional networks of the comparison that recipes do not have: MobileNetV1 and MLPerf Tiny's ResNet-8.

Layer names are those of the weight files in the assets; batch normalization is folded where the file has none.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class MobileNetV1(nn.Module):
    """The 0.5 width at 160×160: x (n, 3, 160, 160), scores (n, 1000). Padding is TensorFlow's SAME."""

    WIDTHS = (32, 64, 64, 128, 128, 256, 256, 256, 256, 256, 256, 512, 512)
    STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2)
        blocks, before = [], 16
        for width, stride in zip(self.WIDTHS, self.STRIDES, strict=True):
            block = nn.Module()
            block.dw = nn.Conv2d(before, before, 3, stride, 1 if stride == 1 else 0, groups=before)
            block.pw = nn.Conv2d(before, width, 1)
            block.strided = stride != 1
            blocks.append(block)
            before = width
        self.blocks = nn.ModuleList(blocks)
        self.classifier = nn.Linear(512, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem(_right_and_bottom(x)))
        for block in self.blocks:
            x = F.relu6(block.dw(_right_and_bottom(x) if block.strided else x))
            x = F.relu6(block.pw(x))
        return self.classifier(x.mean((2, 3)))


class ResNet8(nn.Module):
    """MLPerf Tiny's reference: x (n, 3, 32, 32) in 0…255, scores (n, 10). Padding is TensorFlow's SAME."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16, eps=1e-3)
        self.layer1, self.layer2, self.layer3 = _block(16, 16, 1), _block(16, 32, 2), _block(32, 64, 2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for block in (self.layer1, self.layer2, self.layer3):
            y = F.relu(block.bn1(block.conv1(_right_and_bottom(x) if block.strided else x)))
            y = block.bn2(block.conv2(y))
            x = F.relu(y + (block.shortcut(x) if block.strided else x))
        return self.linear(x.mean((2, 3)))


def _block(before: int, width: int, stride: int) -> nn.Module:
    block = nn.Module()
    block.strided = stride != 1
    block.conv1 = nn.Conv2d(before, width, 3, stride, 1 if stride == 1 else 0)
    block.conv2 = nn.Conv2d(width, width, 3, padding=1)
    block.bn1, block.bn2 = nn.BatchNorm2d(width, eps=1e-3), nn.BatchNorm2d(width, eps=1e-3)
    if stride != 1:
        block.shortcut = nn.Conv2d(before, width, 1, stride)
    return block


def _right_and_bottom(x: Tensor) -> Tensor:
    """What SAME pads an even image with before a 3×3 filter of stride 2."""
    return F.pad(x, (0, 1, 0, 1))


def mobilenet() -> MobileNetV1:
    return MobileNetV1()


def resnet8() -> ResNet8:
    return ResNet8()
