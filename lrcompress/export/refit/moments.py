"""What the inputs of a graph's products look like: second moments, and a few samples, taken in ONNX Runtime.

    seen = observe(model, products, feeds)
    seen["layer1.conv"].second               # E[x xᵀ] over rows, or patches, of the calibration data

Rows under a mask (`attention_mask` of the same two leading axes) do not count. Of a convolution's patches, a seeded
share is taken from every batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper
from torch import Tensor

from ...graphs.running import watching
from ..products import Product

#: Patches of one batch, and samples that are kept whole, per convolution.
_PATCHES, _SAMPLES = 1024, 32
MASK = "attention_mask"


@dataclass
class Seen:
    """Moments of the rows that a product reads: `second` (groups, n, n) = E[x xᵀ], `mean` (groups, n), float64.

    `samples`: inputs of a convolution as they came, (N, channels, *space); `low`, `high`: the range of all inputs.
    """

    second: Tensor
    mean: Tensor
    count: int
    samples: Tensor | None = None
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class Walk:
    """How a convolution walks. Refuses what needs the size of the input to be known: `of` returns None."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, node: onnx.NodeProto, shape: Sequence[int]) -> Walk | None:
        found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if found.get("auto_pad", b"NOTSET") != b"NOTSET":
            return None
        kernel = tuple(shape[2:])
        ones = (1,) * len(kernel)
        return cls(
            kernel, tuple(found.get("strides", ones)), tuple(found.get("pads", (0,) * 2 * len(kernel))),
            tuple(found.get("dilations", ones)), int(found.get("group", 1)),
        )  # fmt: skip

    def padded(self, x: Tensor) -> Tensor:
        n = len(self.kernel)
        flat = [p for i in reversed(range(n)) for p in (self.pads[i], self.pads[n + i])]
        return F.pad(x, flat)

    def patches(self, x: Tensor) -> Tensor:
        """Return (N, *positions, groups, channels/groups · kernel): what the outputs read, a copy."""
        x = self.padded(x)
        n, c, *space = x.shape
        walked = list(zip(space, self.kernel, self.strides, self.dilations, strict=True))
        out = [(s - d * (k - 1) - 1) // t + 1 for s, k, t, d in walked]
        own = x.stride()
        strides = (own[0], *(own[2 + i] * t for i, t in enumerate(self.strides)), own[1])
        strides += tuple(own[2 + i] * d for i, d in enumerate(self.dilations))
        view = x.as_strided((n, *out, c, *self.kernel), strides)
        return view.reshape(n, *out, self.groups, -1)

    def run(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the convolution of x with `weight` (out, in/groups, *k), without bias."""
        call = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(self.kernel)]
        found: Tensor = call(self.padded(x), weight, None, self.strides, 0, self.dilations, self.groups)
        return found


def observe(
    model: onnx.ModelProto, products: Sequence[Product], feeds: Sequence[Mapping[str, np.ndarray]]
) -> dict[str, Seen]:
    """Return what each product's input looked like over `feeds`, by the name of its weight; tables are left out."""
    producers = {o: n for n in model.graph.node for o in n.output}
    wanted = [p for p in products if p.kind in ("matmul", "gemm", "conv")]
    walks = {p.weight: Walk.of(producers[p.output], p.shape) for p in wanted if p.kind == "conv"}
    wanted = [p for p in wanted if p.kind != "conv" or walks[p.weight] is not None]
    if not wanted or not feeds:
        return {}
    inputs = {i.name for i in model.graph.input}
    names = list(dict.fromkeys(p.source for p in wanted if p.source not in inputs))
    session = watching(model, names, threads=torch.get_num_threads(), as_written=False)
    generator = torch.Generator().manual_seed(0)
    sums: dict[object, _Sum] = {}
    for feed in feeds:
        got = dict(zip(names, session.run(names, dict(feed)) if names else [], strict=True)) | dict(feed)
        for p in wanted:
            key = (p.source, walks.get(p.weight))
            if id(feed) != sums.setdefault(key, _Sum()).last:
                sums[key].add(got[p.source], walks.get(p.weight), feed.get(MASK), generator)
                sums[key].last = id(feed)
    return {p.weight: sums[(p.source, walks.get(p.weight))].seen() for p in wanted}


def lookups(products: Sequence[Product], feeds: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return how often each row of a table was looked up, for tables that are read by an input of the graph."""
    found: dict[str, np.ndarray] = {}
    for p in products:
        if p.kind != "table" or not all(p.source in feed for feed in feeds):
            continue
        total = np.zeros(p.shape[0])
        for feed in feeds:
            ids, mask = feed[p.source], feed.get(MASK)
            ids = ids[mask != 0] if mask is not None and mask.shape == ids.shape else ids.reshape(-1)
            total += np.bincount(ids % p.shape[0], minlength=p.shape[0])
        found[p.weight] = total
    return found


class _Sum:
    """Moments in the making: products in float64, for these are inverted."""

    def __init__(self) -> None:
        self.second: Tensor | None = None
        self.mean: Tensor | None = None
        self.count, self.samples = 0, list[Tensor]()
        self.low, self.high = 0.0, 0.0
        self.last = 0

    def add(self, value: np.ndarray, walk: Walk | None, mask: np.ndarray | None, generator: torch.Generator) -> None:
        x = torch.from_numpy(np.ascontiguousarray(value))
        if x.numel() == 0:
            return
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        if walk is not None:
            held = sum(len(s) for s in self.samples)
            if held < _SAMPLES:
                self.samples.append(x[: _SAMPLES - held].clone())
            rows = walk.patches(x).flatten(0, -3)
            rows = rows[torch.randperm(len(rows), generator=generator)[:_PATCHES]].transpose(0, 1)
        else:
            kept = mask is not None and x.dim() == 3 and tuple(mask.shape) == tuple(x.shape[:2])
            rows = (x[torch.from_numpy(mask != 0)] if kept else x.flatten(0, -2))[None]  # type: ignore[operator]
        rows = rows.double()
        second, total = rows.transpose(1, 2) @ rows, rows.sum(1)
        self.second = second if self.second is None else self.second + second
        self.mean = total if self.mean is None else self.mean + total
        self.count += rows.shape[1]

    def seen(self) -> Seen:
        assert self.second is not None and self.mean is not None
        samples = torch.cat(self.samples) if self.samples else None
        n = max(self.count, 1)
        return Seen(self.second / n, self.mean / n, self.count, samples, self.low, self.high)
