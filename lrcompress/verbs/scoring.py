"""What a metric says of a network on `select`, and when it says that one state of it is worse than another."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from .. import metrics
from ..data import Data
from ..model import OpenedModel
from ..recover.keeping import CLEARLY
from .predict import predictor


@dataclass
class Scorer:
    """A metric on `select`: its value for a module, and as a number to minimise. `decides`: it was asked for."""

    metric: metrics.Metric | None
    opened: OpenedModel
    module: nn.Module
    data: Data
    device: str
    decides: bool = False
    original: float | None = None
    numbers: Tensor = field(default_factory=lambda: torch.zeros(0))

    @classmethod
    def of(
        cls, metric: str | None, opened: OpenedModel, module: nn.Module, teacher: OpenedModel | None, data: Data, device: str
    ) -> Scorer:  # fmt: skip
        """Score by `metric`, or for information only by accuracy where `data` has class numbers."""
        chosen = metrics.get(metric) if metric else None
        if (
            chosen is None
            and data.labels is not None
            and np.issubdtype(data.labels.dtype, np.integer)
            and not data.pairs
        ):
            chosen = metrics.get("accuracy")
        scorer = cls(chosen, opened, module, data, device, metric is not None)
        if teacher is not None and teacher.module is not None:
            scorer.original = scorer.value(teacher.module)
        return scorer

    @property
    def name(self) -> str | None:
        return self.metric.name if self.metric else None

    def value(self, module: nn.Module | None = None) -> float | None:
        """Return the metric of a module; None where there is no metric."""
        if self.metric is None:
            return None
        predict = predictor(self.opened, module or self.module, self.device)
        found = self.metric.evaluate(predict, self.data, 250)
        self.numbers = torch.as_tensor(found.per_sample)
        return float(found.value)

    def decide(self) -> float:
        """Return what decides about the network as it is, lower is better."""
        value = self.value()
        assert value is not None
        return self.falling(value)

    def clearly_worse(self, numbers: Tensor, best: Tensor) -> bool:
        """Tell whether the numbers of one state are worse than those of another by more than two standard errors."""
        assert self.metric is not None
        one, other = (self.metric.of(n.cpu().numpy(), self.data.labels) for n in (best, numbers))
        found = metrics.paired(one, other)
        return found.drop > CLEARLY * found.stderr

    def falling(self, value: float) -> float:
        """Return a value of the metric as a number of which less is better."""
        return -value if self.metric is not None and self.metric.direction == "max" else value
