"""What the original answers: asked once for every sample, and kept where the samples come again.

An answer is kept as it came in the first epoch's batch, and a sample whose answer is not there is asked for in that
same batch: a run that was broken off asks the same questions, and trains on the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

#: Named answers of a network to a batch: (samples, …) each.
Answers = dict[str, Tensor]
Ask = Callable[[Mapping[str, Tensor]], Answers]
#: Bytes of answers that are kept in memory.
KEPT_BYTES = 1 << 30


class Kept:
    """Answers by sample, filled batch by batch."""

    def __init__(self, samples: int, most_bytes: int = KEPT_BYTES) -> None:
        self._samples, self._most = samples, most_bytes
        self._held: dict[str, Tensor] = {}
        self._there = np.zeros(samples, bool)
        #: False once answers have shapes of their own, or are too large.
        self.usable = True

    def has(self, samples: np.ndarray) -> np.ndarray:
        found: np.ndarray = self._there[samples]
        return found

    def put(self, samples: np.ndarray, answers: Answers) -> None:
        if not self.usable:
            return
        if not self._held:
            size = self._samples * sum(math.prod(a.shape[1:]) * a.element_size() for a in answers.values())
            self.usable = size <= self._most
            if self.usable:
                self._held = {
                    n: torch.empty((self._samples, *a.shape[1:]), dtype=a.dtype, device=a.device)
                    for n, a in answers.items()
                }
        if any(a.shape[1:] != self._held[n].shape[1:] for n, a in answers.items() if self.usable):
            self.usable = False
        if not self.usable:
            self.drop()
            return
        for n, a in answers.items():
            self._held[n][torch.from_numpy(samples)] = a
        self._there[samples] = True

    def get(self, samples: np.ndarray) -> Answers:
        index = torch.from_numpy(samples)
        return {n: held[index] for n, held in self._held.items()}

    def drop(self) -> None:
        self.usable, self._held = False, {}
        self._there[:] = False


class Teacher:
    """The original's answers to batches of units (samples, or pairs) in training.

    `first`: the pieces of the first epoch that this process takes. `read` returns the inputs of units. Without `keep`
    every batch is asked anew.
    """

    def __init__(
        self, ask: Ask, read: Callable[[np.ndarray], Mapping[str, Tensor]], first: Sequence[np.ndarray], *, units: int,
        width: int = 1, keep: bool = True, most_bytes: int = KEPT_BYTES,
    ) -> None:  # fmt: skip
        self._ask, self._read, self._first, self._width = ask, read, first, width
        self._home = np.full(units, -1, np.int64)
        for i, piece in enumerate(first):
            self._home[piece] = i
        self.kept = Kept(units * width, most_bytes)
        if not keep:
            self.kept.drop()

    def answers(self, units: np.ndarray, inputs: Mapping[str, Tensor]) -> Answers:
        """Return the answers to `units`, whose inputs are `inputs`."""
        if not self.kept.usable:
            return self._ask(inputs)
        samples = self._samples(units)
        missing = units[~self.kept.has(samples).reshape(len(units), -1).all(1)]
        for home in np.unique(self._home[missing]).tolist():
            piece = self._first[home]
            asked = inputs if piece is units or np.array_equal(piece, units) else self._read(piece)
            answers = self._ask(asked)
            self.kept.put(self._samples(piece), answers)
            if not self.kept.usable:
                return answers if asked is inputs else self._ask(inputs)
        return self.kept.get(samples)

    def _samples(self, units: np.ndarray) -> np.ndarray:
        found: np.ndarray = (units[:, None] * self._width + np.arange(self._width)).reshape(-1)
        return found


__all__ = ["KEPT_BYTES", "Answers", "Ask", "Kept", "Teacher"]
