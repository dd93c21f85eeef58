"""What a changed network loses against the original: the one number that everything measured is compared by.

Embeddings: the squared difference of unit vectors (twice one minus the cosine). Logits and anything else: the squared
difference of the answers up to a common shift of each, over its values, the quadratic form that statistics of the
output side describe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..calibrate import telling_output
from ..data import Data
from ..model import OpenedModel, tensors_of

#: Outputs by name for a batch of inputs by name.
Answers = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


class Judge:
    """The original's answers to some inputs. `loss(network)` is the mean loss per sample (per token where each answers)."""

    def __init__(self, opened: OpenedModel, original: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self._opened, self._batches = opened, batches
        with torch.no_grad():
            self._wanted = [self._answer(original, b) for b in batches]
        self.evaluations = 0
        rows = sum(len(y) for y in self._wanted)
        #: The mean square of the answers, which is what an answer of nothing loses.
        self.energy = sum(float(y.double().square().sum()) for y in self._wanted) / max(rows, 1)

    def loss(self, network: nn.Module) -> float:
        """Run `network` on all inputs and return what its answers lose."""
        return self.loss_of(lambda batch: self._opened.outputs(network, batch))

    def loss_of(self, answers: Answers) -> float:
        """Return what the answers of anything lose: a function of a batch that returns outputs by name."""
        self.evaluations += 1
        total, count = 0.0, 0
        with torch.no_grad():
            for batch, wanted in zip(self._batches, self._wanted, strict=True):
                found = self._rows(answers(batch), batch)
                total += float((found - wanted).double().square().sum())
                count += len(found)
        return total / max(count, 1)

    def _answer(self, network: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return self._rows(self._opened.outputs(network, batch), batch)

    def _rows(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Return the telling output as rows (samples or tokens, values), centred where they are more than one."""
        y = telling_output(outputs)
        mask = batch.get("attention_mask")
        if mask is not None and y.dim() == 3 and y.shape[:2] == mask.shape:
            y = y[mask.bool()]
        y = y.reshape(len(y), -1) if y.dim() != 3 else y.reshape(-1, y.shape[-1])
        return y - y.mean(-1, keepdim=True) if y.shape[-1] > 1 else y


def read_batches(data: Data, size: int) -> list[Mapping[str, Tensor]]:
    """Return all samples as batches of tensors."""
    return [tensors_of(b.inputs) for b in data.batches(size)]
