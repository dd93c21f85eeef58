"""The order in which samples are read, which decides nothing but rounding: batches, their size, which carry gradients.

Texts of one length are read together, the longest first, so that little is computed on padding. Batches that carry
gradients are spread evenly over that order. All of it follows from data, model and settings alone, so that a pass that
was killed goes on with the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..data import Batch, Data
from ..errors import DataError

#: Samples read at a time while lengths are looked at.
_BLOCK = 512
#: Bytes that a batch may hold as layer inputs, and the most samples that are worth putting together.
BATCH_BYTES, MOST_SAMPLES = 64_000_000, 128


@dataclass(frozen=True)
class Order:
    """`samples` in the order of reading; `lengths`: the tokens of each, none longer than the first."""

    samples: np.ndarray
    lengths: np.ndarray


@dataclass(frozen=True)
class Batches:
    """`samples[k]`: the samples of batch k; `gradients`: the batches that also serve the output side."""

    samples: list[np.ndarray]
    gradients: frozenset[int]

    @classmethod
    def of(cls, order: Order, size: int | None, longest_bytes: int, gradient_samples: int) -> Batches:
        """Cut `order` into batches of `size` samples, or of `BATCH_BYTES` where the longest sample takes `longest_bytes`.

        So many batches carry gradients that `gradient_samples` are among them.
        """
        samples = []
        start = 0
        while start < len(order.samples):
            taken = size or _fitting(longest_bytes * order.lengths[start] / order.lengths[0])
            samples.append(order.samples[start : start + taken])
            start += taken
        # Of n batches, those with gradients are the middles of as many equal stretches.
        wanted = min(-(-gradient_samples * len(samples) // len(order.samples)), len(samples))
        chosen = (int((k + 0.5) * len(samples) / wanted) for k in range(wanted))
        return cls(samples, frozenset(chosen))


def reading_order(data: Data) -> Order:
    """Return the samples as they come or, of padded texts, the longest first."""
    first = read(data, np.arange(min(1, len(data))))
    if _mask(first) is None:
        return Order(np.arange(len(data)), np.ones(len(data), dtype=np.int64))
    masks = [_mask(batch) for batch in data.batches(_BLOCK)]
    lengths = np.concatenate([m.sum(1) for m in masks if m is not None]).clip(1)
    order = np.argsort(-lengths, kind="stable")
    return Order(order, lengths[order])


def read(data: Data, samples: np.ndarray) -> Batch:
    """Return these samples as one batch."""
    return next(iter(data.take(samples).batches(max(len(samples), 2))))


def _fitting(sample_bytes: float) -> int:
    """Return how many samples of this size to read together."""
    return int(max(min(BATCH_BYTES // max(sample_bytes, 1), MOST_SAMPLES), 1))


def check_finite(batch: Batch, samples: np.ndarray, origin: str) -> None:
    """Raise `DataError` naming the first sample and array with NaN or infinity."""
    for name, array in batch.inputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = next(i for i, row in zip(samples, array, strict=True) if not np.isfinite(row).all())
            raise DataError(
                f"{origin}: {name}", "finite numbers", f"NaN or infinity in sample {bad}", "clean or drop that sample"
            )


def numbered(batches: Batches, start: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number, samples) of the batches from `start` on."""
    yield from list(enumerate(batches.samples))[start:]


def _mask(batch: Batch) -> np.ndarray | None:
    mask = batch.inputs.get("attention_mask")
    return mask if mask is not None and mask.ndim == 2 else None
