"""Two small compressed networks and samples for them, for tests of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from lrcompress.data import Data
from lrcompress.model import InputSpec
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
