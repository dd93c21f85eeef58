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
class Batches:
    """`samples[k]`: the samples of batch k; `gradients`: the batches that also serve the output side."""

    samples: list[np.ndarray]
    gradients: frozenset[int]

    @classmethod
    def of(cls, data: Data, order: np.ndarray, size: int, gradient_samples: int) -> Batches:
        """Cut `order` into batches of `size`; so many of them carry gradients that `gradient_samples` are among them."""
        samples = [order[i : i + size] for i in range(0, len(order), size)]
        wanted = min(-(-gradient_samples * len(samples) // max(len(data), 1)), len(samples))
        return cls(samples, frozenset(int((k + 0.5) * len(samples) / wanted) for k in range(wanted)))


def reading_order(data: Data) -> np.ndarray:
    """Return the samples as they come or, of padded texts, the longest first."""
    first = read(data, np.arange(min(1, len(data))))
    if _mask(first) is None:
        return np.arange(len(data))
    masks = [_mask(batch) for batch in data.batches(_BLOCK)]
    lengths = np.concatenate([m.sum(1) for m in masks if m is not None])
    return np.argsort(-lengths, kind="stable")


def read(data: Data, samples: np.ndarray) -> Batch:
    """Return these samples as one batch."""
    return next(iter(data.take(samples).batches(max(len(samples), 2))))


def batch_size(bytes_per_sample: int) -> int:
    """Return how many samples to read together: a power of two within `BATCH_BYTES`."""
    size = MOST_SAMPLES
    while size > 1 and size * bytes_per_sample > BATCH_BYTES:
        size //= 2
    return size


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
