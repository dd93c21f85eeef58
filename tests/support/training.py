"""Two small compressed networks and samples for them, for tests of training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lrcompress.data import Batch, Data
from lrcompress.model import InputSpec
from lrcompress.model.layers import FactorizedLayer
from lrcompress.verbs.factorize import factorize
from tests.support.blocks import stack
from tests.support.nets import images, small

#: What steps are taken with where the rate does not matter.
RATE = {"learning_rate": 1e-2, "threads": 1}
_MADE = {
    "small": (small, "nets:small", ("batch", 3, 8, 8)),
    "stack": (stack, "blocks:stack", ("batch", 12)),
}


def compressed(folder: Path) -> Path:
    """Write two compressed networks into `folder`: small, of convolutions, and stack, of blocks that repeat."""
    for name, (make, where, shape) in _MADE.items():
        torch.save(make().state_dict(), folder / f"{name}.pt")
        factorize(
            folder / f"{name}.pt", rank=3, method="svd", arch=f"tests.support.{where}",
            inputs=(InputSpec("x", "float32", shape),), output=folder / name,
        )  # fmt: skip
    return folder


def data(n: int = 60, seed: int = 1) -> Data:
    """Return labelled images for `small`."""
    x, y = images(n, seed)
    return Data.of_arrays({"x": x}, y)


def rows(n: int = 40, seed: int = 1) -> Data:
    """Return rows of numbers for `stack`."""
    return Data.of_arrays({"x": np.random.default_rng(seed).standard_normal((n, 12)).astype(np.float32)})


def weight_gradients(module: nn.Module, net: nn.Module, batches: Iterable[Batch]) -> dict[str, torch.Tensor]:
    """Return the gradient of cross-entropy by each factorized layer's weight, (out, columns·kernel), summed over batches.

    `net`: the network that `module` was made from, which gets its weights and is asked instead: no factor, no adapter.
    """
    net.load_state_dict({n: t for n, t in module.state_dict().items() if n in net.state_dict()}, strict=False)
    layers = {n: m for n, m in module.named_modules() if isinstance(m, FactorizedLayer)}
    for name, layer in layers.items():
        plain = net.get_submodule(name)
        plain.weight.data = layer.weight.detach().clone()
        plain.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
    net.eval().zero_grad()
    for batch in batches:
        F.cross_entropy(net(torch.as_tensor(batch.inputs["x"])), torch.as_tensor(batch.labels)).backward()
    return {n: net.get_submodule(n).weight.grad.flatten(1).double() for n in layers}
