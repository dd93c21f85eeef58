"""Which samples a step sees: a function of (seed, epoch) alone, so that a run can go on anywhere.

order = Order(units=8000, per_batch=64, seed=0)
for units in order.epoch(3): ...                    # global batches, every process the same
mine = units[rank::world]                           # what one process of several takes
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Batch, Data
from ..errors import CommandError

#: Part of an image's side that it is shifted by at most.
_SHIFT = 1 / 8
#: Batches whose samples are drawn together.
_POOLED = 16


@dataclass(frozen=True)
class Order:
    """Batches of units (samples, or pairs that stay together) in an order that changes with the epoch.

    With `sizes`, the length of each unit, a batch is of units of like length, so that little is padding: those of
    `_POOLED` batches are drawn together and parted by length.
    """

    units: int
    per_batch: int
    seed: int
    sizes: np.ndarray | None = None

    @classmethod
    def of(cls, data: Data, batch_size: int, seed: int) -> Order:
        width = width_of(data)
        sizes = data.sizes()
        if sizes is not None:
            sizes = sizes[: len(sizes) // width * width].reshape(-1, width).max(1)
        return cls(len(data) // width, max(1, min(batch_size, len(data)) // width), seed, sizes)

    @property
    def batches(self) -> int:
        """How many batches an epoch has; the last one may be smaller."""
        return -(-self.units // self.per_batch)

    def epoch(self, number: int) -> list[np.ndarray]:
        generator = np.random.default_rng([self.seed, number])
        shuffled = generator.permutation(self.units)
        if self.sizes is None:
            return [shuffled[i : i + self.per_batch] for i in range(0, self.units, self.per_batch)]
        batches: list[np.ndarray] = []
        together = self.per_batch * _POOLED
        for start in range(0, self.units, together):
            pool = shuffled[start : start + together]
            pool = pool[np.argsort(self.sizes[pool], kind="stable")]
            parts = [pool[i : i + self.per_batch] for i in range(0, len(pool), self.per_batch)]
            batches += [parts[i] for i in generator.permutation(len(parts))]
        return batches


def width_of(data: Data) -> int:
    """Return how many samples stay together."""
    return 2 if data.pairs else 1


def read_units(data: Data, units: np.ndarray) -> Batch:
    """Return the samples of `units`, with their labels."""
    width = width_of(data)
    samples = (units[:, None] * width + np.arange(width)).reshape(-1)
    return next(iter(data.take(samples).batches(len(samples))))


class Augment:
    """Flip images from left to right and shift them by up to an eighth of their side, edges mirrored.

    What happens to a sample is a function of (seed, epoch, sample): neither its batch nor its process matters.
    """

    def __init__(self, name: str, units: int, width: int, seed: int) -> None:
        self._name, self._units, self._width, self._seed = name, units, width, seed
        self._drawn: tuple[int, np.ndarray] | None = None

    @classmethod
    def of(cls, data: Data, seed: int) -> Augment:
        """Return what augments the one input of images in `data`; `CommandError` where there is none."""
        inputs = read_units(data, np.arange(1)).inputs
        images = [n for n, a in inputs.items() if _is_image(a)]
        if len(images) != 1:
            shapes = ", ".join(f"{n} {a.dtype}{tuple(a.shape[1:])}" for n, a in inputs.items())
            raise CommandError(
                "lrcompress recover --augment", "one input of images (1 to 4 channels, height, width) in floating point",
                shapes, "leave --augment out",
            )  # fmt: skip
        return cls(images[0], len(data) // width_of(data), width_of(data), seed)

    def __call__(self, inputs: dict[str, Tensor], units: np.ndarray, epoch: int) -> dict[str, Tensor]:
        """Return `inputs` with the images of the samples `units` changed."""
        x = inputs[self._name]
        draws = torch.from_numpy(self._draws(epoch)[units].reshape(-1, 3)).to(x.device)
        return {**inputs, self._name: _moved(x, draws)}

    def _draws(self, epoch: int) -> np.ndarray:
        """Return (units, samples of a unit, 3) in [0, 1): flip, shift down, shift right."""
        if self._drawn is None or self._drawn[0] != epoch:
            generator = np.random.default_rng([self._seed, epoch, 1])
            self._drawn = epoch, generator.random((self._units, self._width, 3))
        return self._drawn[1]


def _is_image(array: np.ndarray) -> bool:
    return array.ndim == 4 and array.shape[1] in (1, 2, 3, 4) and min(array.shape[2:]) >= 8 and array.dtype.kind == "f"


def _moved(x: Tensor, draws: Tensor) -> Tensor:
    n, _, height, width = x.shape
    most = [max(1, int(side * _SHIFT)) for side in (height, width)]
    padded = F.pad(x, (most[1], most[1], most[0], most[0]), mode="reflect")
    top, left = ((draws[:, i + 1] * (2 * most[i] + 1)).long() for i in (0, 1))
    rows = top[:, None] + torch.arange(height, device=x.device)
    columns = left[:, None] + torch.arange(width, device=x.device)
    columns = torch.where(draws[:, :1] < 0.5, columns.flip(1), columns)
    which = torch.arange(n, device=x.device)[:, None, None]
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
