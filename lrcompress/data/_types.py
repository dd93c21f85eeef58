"""The two types that travel: `Data`, a view of samples by index, and `Batch`, arrays that are ready for a model.

Samples stay as they were stored; decoding, padding and preprocessing happen batch by batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..files import sha256_json


class InputLike(Protocol):
    """What is asked of a model's input: `InputSpec` of `lrcompress.model` has it."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int | str, ...]: ...


class Store(Protocol):
    """Samples of some kind, read by index."""

    def __len__(self) -> int: ...
    def read(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """Return the samples `index`, preprocessed, as one array per input."""
        ...

    def digest(self) -> str: ...


@dataclass
class Batch:
    """`inputs`: arrays by input name, first axis = sample; `labels`: one per sample, or per pair of samples."""

    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None


class Data:
    """Samples of a store, chosen by `index`. With `pairs`, samples 2i and 2i+1 are pair i and labels are per pair."""

    def __init__(
        self,
        store: Store,
        labels: np.ndarray | None = None,
        *,
        pairs: bool = False,
        index: np.ndarray | None = None,
        origin: str = "data",
    ) -> None:
        self._store = store
        self._index = np.arange(len(store)) if index is None else index
        self._labels = labels
        self.pairs = pairs
        self.origin = origin

    @classmethod
    def of_arrays(
        cls, inputs: Mapping[str, np.ndarray], labels: np.ndarray | None = None, *, pairs: bool = False
    ) -> Data:
        """Return data over arrays that are already what the model takes."""
        return cls(ArrayStore(dict(inputs)), labels, pairs=pairs)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def labels(self) -> np.ndarray | None:
        """Labels in the order of the samples; with `pairs`, one per pair."""
        return self._labels

    def sizes(self) -> np.ndarray | None:
        """Return the length of each sample where samples are of unequal length, or None."""
        find = getattr(self._store, "sizes", None)
        if find is None:
            return None
        found: np.ndarray = find()[self._index]
        return found

    def batches(self, size: int, *, seed: int | None = None) -> Iterator[Batch]:
        """Yield batches of at most `size` samples; `seed` shuffles them (pairs stay together)."""
        if size < 1:
            raise ValueError(f"a batch has at least 1 sample, not {size}")
        width = 2 if self.pairs else 1
        units = np.arange(len(self) // width)
        if seed is not None:
            units = np.random.default_rng(seed).permutation(units)
        per_batch = max(1, size // width)
        for start in range(0, len(units), per_batch):
            chosen = units[start : start + per_batch]
            samples = (chosen[:, None] * width + np.arange(width)).reshape(-1)
            labels = None if self._labels is None else self._labels[chosen]
            yield Batch(self._store.read(self._index[samples]), labels)

    def take(self, chosen: slice | Sequence[int] | np.ndarray) -> Data:
        """Return the samples `chosen`, in that order; half a pair makes them all single samples without labels."""
        where = np.arange(len(self))[chosen] if isinstance(chosen, slice) else np.asarray(chosen, dtype=np.int64)
        index = self._index[where]
        if not self.pairs:
            return Data(
                self._store, None if self._labels is None else self._labels[where], index=index, origin=self.origin
            )
        first, second = where[0::2], where[1::2]
        whole = len(where) % 2 == 0 and bool(np.all(first % 2 == 0)) and bool(np.all(second == first + 1))
        if not whole:
            return Data(self._store, index=index, origin=self.origin)
        labels = None if self._labels is None else self._labels[first // 2]
        return Data(self._store, labels, pairs=True, index=index, origin=self.origin)

    def mapped(self, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Data:
        """Return the same samples, the inputs of each batch put through `change`."""
        store = _Mapped(self._store, change)
        return Data(store, self._labels, pairs=self.pairs, index=self._index, origin=self.origin)

    def digest(self) -> str:
        """Return a hash of everything a model or a metric can see of these samples."""
        labels = None if self._labels is None else array_digest({"labels": self._labels})
        return sha256_json(
            {
                "store": self._store.digest(),
                "index": array_digest({"i": self._index}),
                "labels": labels,
                "pairs": self.pairs,
            }
        )


@dataclass(frozen=True)
class _Mapped:
    """A store whose samples are changed as they are read."""

    store: Store
    change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]

    def __len__(self) -> int:
        return len(self.store)

    def read(self, index: np.ndarray) -> dict[str, np.ndarray]:
        return self.change(self.store.read(index))

    def digest(self) -> str:
        return self.store.digest()


class ArrayStore:
    """Arrays as they are."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self._arrays = arrays

    def __len__(self) -> int:
        return len(next(iter(self._arrays.values()))) if self._arrays else 0

    def read(self, index: np.ndarray) -> dict[str, np.ndarray]:
        return {name: array[index] for name, array in self._arrays.items()}

    def digest(self) -> str:
        return array_digest(self._arrays)


def array_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Return one hash over names, dtypes, shapes and bytes; arrays of text count as JSON."""
    h = hashlib.sha256()
    for name in sorted(arrays):
        a = np.ascontiguousarray(arrays[name])
        h.update(f"{name}|{a.dtype.str}|{a.shape}|".encode())
        h.update(sha256_json(a.tolist()).encode() if a.dtype.kind in "OUS" else a.tobytes())
    return h.hexdigest()
