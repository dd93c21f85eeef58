"""The pass itself: batch after batch through a view, with checkpoints that a killed pass continues from.

Whatever is random in batch k depends on the seed and on k alone, never on what ran before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..data import Data
from ..errors import DataError
from ..factorize import Statistics
from ..files import sha256_json
from ..model import tensors_of
from ..model.surgery import Layer
from ..model.views import LayerView, Reading, Walk
from ..progress import Progress
from .batches import Batches, Order, check_finite, numbered, read, reading_order
from .collected import Collected
from .gradients import LOSSES, cotangent, telling_output

#: A layer with more outputs than this (the head of a language model) has no output moments: they are n×n.
MAX_OUTPUTS = 8192
#: Samples that are run before the pass, to see what they need and whether the network takes them.
_TRIED = 2
#: What a network says when it cannot run its inputs: wrong shapes, dtypes, ids out of range, missing arguments.
_REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AssertionError)

#: Called after every batch with what is collected and the number of the next batch.
Checkpoint = Callable[[Collected, int], None]


@dataclass(frozen=True)
class Settings:
    """What decides the numbers besides model and data. `batch_size` None: by memory."""

    batch_size: int | None = None
    gradient_samples: int = 512
    loss: str = "logits"
    seed: int = 0
    compute: str = "cpu"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Pass:
    """One pass over `data`; `run` may start with what an earlier one collected."""

    def __init__(self, view: LayerView, data: Data, layers: Sequence[Layer], settings: Settings) -> None:
        if settings.loss not in LOSSES:
            raise ValueError(f"loss is one of {', '.join(LOSSES)}, not {settings.loss!r}")
        if len(data) == 0:
            raise DataError("calibration data", "at least one sample", "none")
        self.view, self.data, self.layers, self.settings = view, data, list(layers), settings
        self.device = torch.device(settings.compute)

    @cached_property
    def batches(self) -> Batches:
        """The batches of this pass, the same every time."""
        gradients = self.settings.gradient_samples if self.view.differentiable else 0
        return Batches.of(self._order, self.settings.batch_size, self._tried[0], gradients)

    @property
    def answers(self) -> str:
        """A hash of what the network answers to its first samples: what it computes, whatever it is made of."""
        return self._tried[1]

    def run(
        self, collected: Collected, progress: Progress, *, start: int = 0, checkpoint: Checkpoint | None = None
    ) -> dict[str, Statistics]:
        """Run the batches from `start` on; return the statistics of all."""
        with self.view.on(self.device), progress.task("calibrate", total=len(self.data)) as advance:
            advance(sum(map(len, self.batches.samples[:start])))
            for number, samples in numbered(self.batches, start):
                self._one(number, samples, collected)
                advance(len(samples))
                if checkpoint is not None:
                    checkpoint(collected, number + 1)
        return collected.finished(self.layers, len(self.data))

    @cached_property
    def _order(self) -> Order:
        return reading_order(self.data)

    @cached_property
    def _tried(self) -> tuple[int, str]:
        """Run the first samples alone; return the bytes that layers read per sample, and the hash of the answers."""
        samples = self._order.samples[:_TRIED]
        seen: dict[Any, Tensor] = {}  # values are held: only then keys tell them apart

        def deliver(reading: Reading) -> None:
            seen[reading.key] = reading.value

        batch = read(self.data, samples)
        check_finite(batch, samples, self.data.origin)
        with self.view.on(self.device):
            names = [layer.name for layer in self.layers]
            outputs = self._refusing(lambda: self.view.read(tensors_of(batch.inputs, self.device), names, deliver))
        said = {n: hashlib.sha256(t.detach().cpu().double().numpy().tobytes()).hexdigest() for n, t in outputs.items()}
        held_bytes = sum(t.numel() * t.element_size() for t in seen.values())
        return max(held_bytes // len(samples), 1), sha256_json(said)

    def _one(self, number: int, samples: Any, collected: Collected) -> None:
        batch = read(self.data, samples)
        check_finite(batch, samples, self.data.origin)
        inputs = tensors_of(batch.inputs, self.device)
        mask = _mask(inputs)
        reader = collected.batch(self.layers, self.view.walks, mask)
        outputs: list[tuple[str, Tensor]] | None = [] if number in self.batches.gradients else None
        names = [layer.name for layer in self.layers]
        answers = self._refusing(lambda: self.view.read(inputs, names, reader.deliver, outputs), lambda: reader.fault)
        reader.close()
        if outputs is not None and telling_output(answers).requires_grad:
            generator = torch.Generator().manual_seed(_seed(self.settings.seed, number))
            v = cotangent(self.settings.loss, answers, generator=generator, mask=mask, labels=batch.labels)
            self._add_gradients(telling_output(answers), v, outputs, collected, mask)

    def _add_gradients(
        self, answer: Tensor, v: Tensor, outputs: list[tuple[str, Tensor]], collected: Collected, mask: Tensor | None
    ) -> None:
        walks = self.view.walks
        wanted = [(n, t) for n, t in outputs if t.requires_grad and _width(t, walks.get(n)) <= MAX_OUTPUTS]
        if not wanted:
            return
        gradients = torch.autograd.grad(answer, [t for _, t in wanted], v.to(answer), allow_unused=True)
        for (name, _), gradient in zip(wanted, gradients, strict=True):
            if gradient is not None:
                collected.add_gradient(name, gradient, walks.get(name), mask)

    def _refusing(
        self, call: Callable[[], Mapping[str, Tensor]], fault: Callable[[], Exception | None] = lambda: None
    ) -> Mapping[str, Tensor]:
        """Return what the network answers; `DataError` where it cannot run the data. `fault`: what failed of ours."""
        try:
            return call()
        except _REFUSALS as e:
            if fault() is not None:
                raise
            line = next((line.strip() for line in str(e).splitlines() if line.strip()), type(e).__name__)
            raise DataError(
                self.data.origin, "inputs that the network runs on", line, "check the shapes and dtypes of the arrays"
            ) from e


def _width(output: Tensor, walk: Walk | None) -> int:
    return output.shape[-1] if walk is None else output.shape[1]


def _mask(inputs: Mapping[str, Tensor]) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return mask.bool() if mask is not None and mask.dim() == 2 else None


def _seed(seed: int, number: int) -> int:
    """Return the seed of batch `number`: 63 bits that share nothing with those of its neighbours."""
    return int.from_bytes(hashlib.sha256(f"calibrate {seed} {number}".encode()).digest()[:8], "big") >> 1
